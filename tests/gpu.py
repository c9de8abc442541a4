"""What tests on a GPU share; they are skipped where torch sees none."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


class DrawnOnTheCPU(TorchDispatchMode):
    """All that is random is drawn on the CPU, from its generator, and copied to where it was asked for.

    So that a GPU and a CPU see the same draws. A generator of the GPU stands for one of the CPU with its seed.
    """

    def __init__(self):
        super().__init__()
        self.twins = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        places = [leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)]
        places += [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        if torch.Tag.nondeterministic_seeded not in func.tags or all(place.type == "cpu" for place in places):
            return func(*args, **kwargs)
        (device,) = {place for place in places if place.type != "cpu"}
        args_here, kwargs_here = tree_map(self.here, (args, kwargs))
        results = func(*args_here, **kwargs_here)
        if func._schema.is_mutable:
            return args[0].copy_(results)
        return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, results)

    def here(self, leaf):
        if isinstance(leaf, torch.Tensor):
            return leaf.cpu()
        if isinstance(leaf, torch.Generator) and leaf.device.type != "cpu":
            twin = torch.Generator("cpu").manual_seed(leaf.initial_seed())
            return self.twins.setdefault(id(leaf), (twin, leaf))[0]  # the leaf too, lest another get its id
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
