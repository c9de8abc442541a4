"""What needs a GPU: tests that run where torch sees one, and are skipped elsewhere."""

import pytest
import torch

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
