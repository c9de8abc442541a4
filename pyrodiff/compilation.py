r"""A function of tensors as one compiled graph: whatever Python it runs through, only what it does to tensors is kept.

A function is run once with its tensors tracked, which sees through Pyro's handlers as through any other Python: what
is left is a graph of tensor operations, forward and backward. Random draws stay draws: with the same seed a graph
draws the normal and the uniform numbers that the function would, except that draws which nothing depends on are left
out, and that inductor makes Bernoulli draws in its own way. The graph is compiled by inductor, one graph for each shape
of the arguments.
"""

import re
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map

from . import checks
from .terms import Recorder

__all__ = ["Compiled", "Composition", "Replayed", "captured", "kind_of"]


def kind_of(args: Any) -> Hashable:
    """What a graph is made for: the shapes of tensors, and all else as it is. Not hashable where that is not.

    Arguments:
        args: Tensors and other things, in any nesting.
    """
    leaves, structure = (args, None) if _is_flat(args) else tree_flatten(args)
    kinds = tuple(
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves
    )
    places = [id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    same = () if len(set(places)) == len(places) else tuple(places.index(place) for place in places)
    return structure, kinds, same


class Compiled:
    """A function that runs as a compiled graph of what it does to tensors, or as it is where that cannot be.

    The first call with tensors of some shapes runs the function and keeps its graph, the following ones run the graph.
    A module has a graph for training and one for evaluation, and a new one where a parameter, a buffer or a submodule
    is replaced. Only so many graphs are made, so that ever new shapes do not mean ever new compilations. What
    Python itself does while the function runs (a counter, a draw of ``random``) happens once a graph.

    Arguments:
        function: Called with tensors, and other things that can be hashed, in any nesting; it returns a tuple of
            tensors or None.
        modules: The modules whose state it reads and changes.
        tensors: Further tensors that it reads and changes.
        limit: How many graphs are made at most.
        name: What is compiled, for warnings.

    Attributes:
        made: How many graphs were made.
        failure: Why no more are made: the limit is reached, or one could not be traced or compiled; empty until then.
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
        if graph is not None and graph.parts.holds():
            return graph(*args)
        if not self.failure and self.made >= self.limit:
            self._give_up(f"{self.limit} graphs were made for it, and this would be one more")
        return self.function(*args) if self.failure else self._make(key, args)

    def graph_for(self, *args: Any) -> Callable | None:
        """The graph for arguments of this kind, if there is one that holds now: for a loop in which nothing changes."""
        graph = self._graphs.get(self._key(args))
        return graph if graph is not None and graph.parts.holds() else None

    def _key(self, args: tuple) -> Hashable:
        modes = tuple(module.training for module in self.modules)
        return kind_of(args), modes, torch.is_grad_enabled(), torch.get_default_dtype()

    def _make(self, key: Hashable, args: tuple) -> Any:
        """The graph of these arguments; what the function returns as it is traced is the result."""
        untraced, restore = None, _snapshot(self.modules)
        with Recorder() as heard:
            try:
                graph = _Graph(self.function, args, self.modules, self.tensors)
                changed = graph.parts.changed()
            except Exception as error:  # whatever a program does that a graph cannot
                untraced = error
        if untraced is not None:
            restore()
            self._give_up(_reason(untraced, heard.sites))
            return self.function(*args)
        if changed:  # as it would at every call
            self._give_up(f"it puts another tensor or module in the place of {changed}")
            return graph.take_results()
        try:
            graph.compile()
            self.made, self._graphs[key] = self.made + 1, graph
        except Exception as error:  # no compiler on this machine, or an operation that inductor does not know
            self._give_up(f"inductor does not compile its graph: {_first_line(error)}")
        return graph.take_results()

    def _give_up(self, reason: str) -> None:
        """Make no more graphs, and say why, once. Those that were made before are still run."""
        self.failure = reason
        warnings.warn(f"{self.name} runs without being compiled: {reason}", RuntimeWarning, stacklevel=2)


class Composition:
    """What modules are made of, by identity, and of what kind tensors are.

    Arguments:
        modules: The modules.
        tensors: The tensors.
        buffers: Whether buffers count.
    """

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor], buffers: bool = True) -> None:
        modules = list(modules)
        kinds = [kind for m in modules for kind in (m._parameters, m._modules, *((m._buffers,) if buffers else ()))]
        self._parts = [(kind, name, value) for kind in kinds for name, value in kind.items()]
        self._kinds = [(tensor, tensor.requires_grad, tensor.dtype, tensor.device) for tensor in tensors]

    def holds(self) -> bool:
        """Whether they still are."""
        return all(kind.get(name) is value for kind, name, value in self._parts) and all(
            tensor.requires_grad is flag and tensor.dtype is dtype and tensor.device == device
            for tensor, flag, dtype, device in self._kinds
        )

    def changed(self) -> str:
        """The name of the first part that is another; empty if none is."""
        return next((repr(name) for kind, name, value in self._parts if kind.get(name) is not value), "")


class Replayed:
    """A function of tensors as one CUDA graph, in which nothing is launched from Python.

    What the function does to tensors that it holds on to, it does at each call. It must not wait for the device, and
    work on the same memory each time; it has run before, so that all it needs is there.

    Arguments:
        function: Called with tensors, it returns one.
        args: Tensors of the shapes that it will be called with.
    """

    def __init__(self, function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
        self.held = [arg.clone() for arg in args]
        self._run = captured(lambda: function(*self.held))

    def __call__(self, *args: Tensor) -> Tensor:
        for held, arg in zip(self.held, args, strict=True):
            held.copy_(arg)
        return self._run().clone()


def captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that replays, on the device, what another did there; the result stands in the same memory each time.

    Arguments:
        function: The function, which is run once without effect on the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class _Graph:
    """The graph of what a function does to tensors, called with arguments of the same kind.

    Everything that it reads is an input of the graph, by reference: the arguments, the state of the modules, and
    whatever other tensors it comes upon.
    """

    def __init__(self, function: Callable, args: tuple, modules: list[nn.Module], tensors: list[Tensor]) -> None:
        state = [*_of(modules, "_parameters"), *_of(modules, "_buffers")]
        known = list({id(tensor): tensor for tensor in (*state, *tensors)}.values())
        args = _copied(args, {id(tensor) for tensor in known})
        given = _tensors(args)
        self.parts = Composition(modules, known)

        def run(*tracked: Tensor) -> tuple:
            with checks.trusting(blind=True):
                self.results = function(*args)
            return self.results

        self.module = make_fx(run)(*given, *known)
        self.inputs = _lifted(self.module, len(given), known)
        self.given = given
        self._alike: list[int] | None = None

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


def _is_flat(args: Any) -> bool:
    return all(isinstance(arg, Tensor) or arg is None for arg in args)


def _tensors(args: tuple) -> list[Tensor]:
    if _is_flat(args):
        return [arg for arg in args if arg is not None]
    return [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]


def _copied(args: tuple, taken: set[int]) -> tuple:
    """The arguments, with copies of those that are also state: the next ones may not be."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and id(leaf) in taken else leaf, args)


def _of(modules: list[nn.Module], kind: str) -> list[Tensor]:
    """The ``_parameters`` or ``_buffers`` of the modules themselves."""
    return [tensor for module in modules for tensor in getattr(module, kind).values() if tensor is not None]


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
    buffers = [(buffer, buffer.clone()) for buffer in _of(modules, "_buffers")]
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
