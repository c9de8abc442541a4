r"""A function of tensors as one compiled graph: whatever Python it runs through, only what it does to tensors is kept.

A function is run once with its tensors tracked, which sees through Pyro's handlers as through any other Python: what
is left is a graph of tensor operations, forward and backward. Random draws stay draws: with the same seed a graph
draws what the function would, except that draws which nothing depends on are left out. The graph is compiled by
inductor, one graph for each shape of the arguments.
"""

import re
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten

from . import checks
from .terms import Recorder

__all__ = ["Compiled", "kind_of"]


def kind_of(args: Any) -> Hashable:
    """What a graph is made for: the shapes of tensors, and all else as it is. Not hashable where that is not.

    Arguments:
        args: Tensors and other things, in any nesting.
    """
    if all(isinstance(arg, Tensor) for arg in args):
        return tuple((arg.shape, arg.dtype, arg.device) for arg in args)
    leaves, structure = tree_flatten(args)
    return structure, tuple(
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves
    )


class Compiled:
    """A function that runs as a compiled graph of what it does to tensors, or as it is where that cannot be.

    The first call with tensors of some shapes runs the function and keeps its graph, the following ones run the graph.
    A module that is switched between training and evaluation, or has a parameter, a buffer or a submodule replaced,
    gets a graph anew. Only so many graphs are made, so that ever new shapes do not mean ever new compilations. What
    Python itself does while the function runs (a counter, a draw of ``random``) happens once a graph.

    Arguments:
        function: Called with tensors, and other things that can be hashed, in any nesting; it returns a tuple of
            tensors or None.
        modules: The modules whose state it reads and changes.
        tensors: Further tensors that it reads and changes.
        limit: How many graphs are made at most.
        name: What is compiled, for warnings.
    """

    def __init__(
        self,
        function: Callable,
        modules: Iterable[nn.Module] = (),
        tensors: Iterable[Tensor] = (),
        limit: int = 8,
        name: str = "the program",
    ) -> None:
        self.function, self.limit, self.name = function, limit, name
        self.modules = list({id(part): part for module in modules for part in module.modules()}.values())
        self.tensors, self.made, self.failure = list(tensors), 0, ""
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, *args: Any) -> Any:
        key = self._key(args)
        graph = self._graphs.get(key)
        if graph is not None and graph.is_fresh():
            return graph(*args)
        if self.failure or self.made >= self.limit:
            if not self.failure:
                self._give_up(f"{self.limit} graphs were made for it, and this would be one more")
            return self.function(*args)
        return self._make(key, args)

    def graph_for(self, *args: Any) -> Callable | None:
        """The graph for arguments of this kind, if there is one: for a loop in which nothing else changes."""
        return self._graphs.get(self._key(args))

    @staticmethod
    def _key(args: tuple) -> Hashable:
        return kind_of(args), torch.is_grad_enabled(), torch.get_default_dtype()

    def _make(self, key: Hashable, args: tuple) -> Any:
        """The graph of these arguments; what the function returns as it is traced is the result."""
        failure, restore = None, _snapshot(self.modules)
        with Recorder() as heard:
            try:
                graph = _Graph(self.function, args, self.modules, self.tensors)
            except Exception as error:  # whatever a program does that a graph cannot
                failure = error
        if failure is not None:
            restore()
            self._give_up(_reason(failure, heard.sites))
            return self.function(*args)
        try:
            graph.compile()
            self.made, self._graphs[key] = self.made + 1, graph
        except Exception as error:  # no compiler on this machine, or an operation that inductor does not know
            self._give_up(f"inductor does not compile its graph: {_first_line(error)}")
        return graph.take_results()

    def _give_up(self, reason: str) -> None:
        self.failure = reason
        warnings.warn(f"{self.name} runs without being compiled: {reason}", RuntimeWarning, stacklevel=2)


class _Graph:
    """The graph of what a function does to tensors, called with arguments of the same kind.

    Everything that it reads is an input of the graph, by reference: the arguments, the state of the modules, and
    whatever other tensors it comes upon.
    """

    def __init__(self, function: Callable, args: tuple, modules: list[nn.Module], tensors: list[Tensor]) -> None:
        given = _tensors(args)
        state = [tensor for module in modules for tensor in _own(module).values()]
        known = list({id(tensor): tensor for tensor in (*state, *tensors)}.values())

        def run(*tracked: Tensor) -> tuple:
            with checks.trusting(blind=True):
                self.results = function(*args)
            return self.results

        self.module = make_fx(run)(*given, *known)
        self.inputs = _lifted(self.module, len(given), known)
        self.num_given, self.given = len(given), given
        self._alike: list[int] | None = None
        self._flags = [(module, module.training) for module in modules]
        self._parts = [(part, name, value) for module in modules for part, name, value in _parts(module)]
        self._learned = [(tensor, tensor.requires_grad) for tensor in known]

    def compile(self) -> None:
        """Compile it, for tensors like those that it was made with."""
        options = {  # with fallback_random a seed draws what it does in the function
            "fallback_random": True,
            "post_grad_custom_pre_pass": _pass(),
        }
        if all(tensor.device.type == "cpu" for tensor in (*self.given, *self.inputs)):
            options["layout_optimization"] = False  # measured: slower by 5 % for convolutions forward and backward
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch has to say of itself
            self.code = torch._inductor.compile(self.module, [*self.given, *self.inputs], options=options)
        self.module, self.given = None, None

    def take_results(self) -> tuple:
        """What the function returned when it was traced."""
        results, self.results = self.results, None
        return results

    def is_fresh(self) -> bool:
        """Whether the modules are what they were."""
        return (
            all(module.training is flag for module, flag in self._flags)
            and all(part.get(name) is value for part, name, value in self._parts)
            and all(tensor.requires_grad is flag for tensor, flag in self._learned)
        )

    def __call__(self, *args: Any) -> list[Tensor | None]:
        with torch.no_grad():
            results = list(self.code(*_tensors(args), *self.inputs))
        if self._alike is None:
            self._alike = _alike(results)
        for i in self._alike:
            results[i] = results[i].clone()
        return results


def _alike(results: list[Tensor | None]) -> list[int]:
    """Which results share the memory of an earlier one, as equal gradients do in a compiled graph."""
    places = [None if result is None else result.untyped_storage().data_ptr() for result in results]
    return [i for i, place in enumerate(places) if place is not None and place in places[:i]]


def _merge_alike(graph: fx.Graph) -> None:
    """Compute once what is computed twice: gradients often are, and inductor 2.13 fails on a bfloat16 sum so stored."""
    found: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.is_impure():
            continue
        first = found.setdefault(f"{node.target}{node.args}{node.kwargs}", node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _pass() -> object:
    """:func:`_merge_alike` as inductor takes it; made late, since inductor takes seconds to import."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            _merge_alike(graph)

        def uuid(self) -> bytes:
            return get_hash_for_files((__file__,))

    return Pass()


def _tensors(args: tuple) -> list[Tensor]:
    if all(isinstance(arg, Tensor) for arg in args):
        return list(args)
    return [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]


def _own(module: nn.Module) -> dict[str, Tensor]:
    tensors = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _parts(module: nn.Module) -> list[tuple[dict, str, object]]:
    kinds = (module._parameters, module._buffers, module._modules)
    return [(kind, name, value) for kind in kinds for name, value in kind.items()]


def _lifted(module: fx.GraphModule, num_given: int, known: list[Tensor]) -> list[Tensor]:
    """Make constants of a graph its inputs, and drop those inputs, but for the given, that it does not use."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs = []
    for node, tensor in zip(placeholders[num_given:], known, strict=True):
        if node.users:
            inputs.append(tensor)
        else:
            module.graph.erase_node(node)
    last = next(node for node in reversed(module.graph.nodes) if node.op == "placeholder") if placeholders else None
    found: dict[int, fx.Node] = {}
    for node in [node for node in module.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, node.target)
        if not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in found:
            with module.graph.inserting_after(last) if last is not None else module.graph.inserting_before():
                last = found[id(tensor)] = module.graph.placeholder(f"constant_{len(found)}")
            inputs.append(tensor)
        node.replace_all_uses_with(found[id(tensor)])
        module.graph.erase_node(node)
    module.recompile()
    return inputs


def _snapshot(modules: list[nn.Module]) -> Callable[[], None]:
    """Keeps the random sources and the buffers; called, it puts them back."""
    buffers = [
        (buffer, buffer.clone()) for module in modules for buffer in module._buffers.values() if buffer is not None
    ]
    random, on_cuda = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        torch.set_rng_state(random)
        torch.cuda.set_rng_state_all(on_cuda)

    return restore


def _reason(error: Exception, sites: list[str]) -> str:
    """Why a program cannot be traced: the operation, the line of the program, and the site that it came after."""
    operation = re.search(r"aten\.\w+", str(error))
    what = f"{operation[0]} reads the value of a tensor" if operation else _first_line(error)
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not re.search(r"[/\\](torch|pyro|pyrodiff|contextlib\.py)([/\\]|$)", frame.filename)
    ]
    where = f", in {outside[-1].name}, line {outside[-1].lineno}: {outside[-1].line}" if outside else ""
    return f"{what}{where}{f' (after site {sites[-1]!r})' if sites else ''}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
