"""The pages of this folder are tests, its programs are not: building the docs runs the tutorials."""

from collections.abc import Iterator

import pytest
from torch._inductor import config

collect_ignore = ["conf.py", "gallery.py", "pages.py", "tutorials", "generated", "_build"]


@pytest.fixture(autouse=True)
def _scalar() -> Iterator[None]:
    """Let inductor do without vector instructions on a page, in half of the time: ``tests`` compile with them."""
    with config.patch({"cpp.simdlen": 1}):
        yield
