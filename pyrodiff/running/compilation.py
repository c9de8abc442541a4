r"""A function of tensors as one compiled graph: only its tensor operations are kept, whatever Python runs around them.

The function is traced once, through Pyro's handlers as through any other Python, into a graph of tensor operations,
forward and backward. Random draws stay draws: with the same seed a graph draws the same normal and uniform numbers as
the function, except that unused draws are left out, and that inductor makes Bernoulli draws in its own way. The graph
is compiled by inductor, one graph for each shape of the arguments.
"""

import functools
import operator
import re
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as nn_module
from torch.utils._pytree import tree_flatten, tree_map

from ..pair.terms import Recorder

__all__ = ["Compiled", "Composition", "Graph", "Replayed", "as_written", "captured", "kind_of"]


def kind_of(args: Any) -> Hashable:
    """The key of a graph: shapes, strides, dtypes and devices of tensors, and other arguments as they are (hashable or
    not).

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
    """A function that runs as a compiled graph of its tensor operations, or uncompiled where that is impossible.

    The first call with tensors of given shapes traces the function, later ones run the graph. A module has a graph for
    training and one for evaluation, and a new one if anything that it holds is replaced: a parameter, a buffer, a
    submodule, a hook, a tensor or a number in a plain attribute. At most ``limit`` graphs are made, so that ever new
    shapes do not compile forever. Python code of the function that is not a tensor operation (a draw of ``random``, the
    value of a variable that it closes over) is run once per graph; a tensor that it closes over is named in a warning,
    since the graph would not notice its replacement.

    Arguments:
        function: Called with tensors, and other things that can be hashed, in any nesting; it returns a tuple of
            tensors or None.
        modules: The modules whose state it reads and changes.
        tensors: Further tensors that it reads and changes.
        limit: The largest number of graphs.
        name: A name for the function in warnings.
        options: Called at each call, it returns what else a graph is for, beside the kind of the arguments.

    Attributes:
        made: How many graphs were made.
        failure: Why no more are made: the limit is reached, or tracing or compiling failed; empty until then.
    """

    def __init__(
        self,
        function: Callable,
        modules: Iterable[nn.Module] = (),
        tensors: Iterable[Tensor] = (),
        limit: int = 8,
        name: str = "the program",
        options: Callable[[], Hashable] = tuple,
    ) -> None:
        self.function, self.limit, self.name, self.options = function, limit, name, options
        self.roots = list(modules)
        self.modules = _below(self.roots)  # their modes, training or evaluation, are part of the key
        self.tensors, self.made, self.failure = list(tensors), 0, ""
        self._graphs: dict[Hashable, Graph] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": 0, "failure": "", "_graphs": {}}  # a copy makes graphs of its own

    def __call__(self, *args: Any) -> Any:
        key = self._key(args)
        graph = self._graphs.get(key)
        if graph is not None and graph.parts.holds():
            return graph(*args)
        if not self.failure and self.made >= self.limit:
            self._give_up(f"{self.limit} graphs were made for it, and this would be one more")
        return self.function(*args) if self.failure else self._make(args)

    def graph_for(self, *args: Any) -> "Graph | None":
        """The graph for arguments of this kind, if there is a valid one: for a loop in which nothing is replaced."""
        graph = self._graphs.get(self._key(args))
        return graph if graph is not None and graph.parts.holds() else None

    def _key(self, args: tuple) -> Hashable:
        modes = tuple(module.training for module in self.modules)
        autocast = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        return kind_of(args), modes, torch.is_grad_enabled(), torch.get_default_dtype(), self.options(), *autocast

    def _make(self, args: tuple) -> Any:
        """Make the graph for these arguments; returns what the function returned while it was traced."""
        modules, untraced = _below(self.roots), None
        restore = _snapshot(modules)
        with Recorder() as heard:
            try:
                graph = Graph(self.function, args, modules, self.tensors, self.modules)
                changed = graph.parts.changed()
            except Exception as error:  # whatever a program does that a graph cannot
                untraced = error
        if untraced is not None:
            restore()
            self._give_up(_reason(untraced, heard.sites))
            return self.function(*args)
        if changed:  # and would be again at every call
            self._give_up(f"it puts something else in the place of {changed}")
            return graph.take_results()
        self._warn_of(graph.unknown)
        try:
            graph.compile()
            self.made, self._graphs[self._key(args)] = self.made + 1, graph
        except Exception as error:  # no compiler on this machine, or an operation that inductor does not know
            self._give_up(f"inductor does not compile its graph: {_first_line(error)}")
        return graph.take_results()

    def _warn_of(self, tensors: list[Tensor]) -> None:
        """Warn of tensors that a graph reads but no module holds, by name."""
        if not tensors:
            return
        known = {id(tensor): name for name, tensor in _closed_over([self.function, *_below(self.roots)])}
        names = [known.get(id(tensor), f"one of shape {tuple(tensor.shape)} and {tensor.dtype}") for tensor in tensors]
        warnings.warn(
            f"{self.name} reads tensors that no module of it holds: {', '.join(sorted(set(names)))}. The graph reads "
            "these very tensors: what is written into them in place is seen, another tensor put in their place is not. "
            "Let one be a buffer or an attribute of a module, or an argument",
            RuntimeWarning,
            stacklevel=2,
        )

    def _give_up(self, reason: str) -> None:
        """Stop making graphs, and warn why, once. Existing graphs are still run."""
        self.failure = reason
        warnings.warn(f"{self.name} runs without being compiled: {reason}", RuntimeWarning, stacklevel=2)


class Composition:
    """A record of what modules hold (parameters, buffers, submodules, hooks, plain attributes), to see if it was
    replaced.

    Tensors and other objects are compared by identity, numbers and strings by value. Lists, tuples, dicts, sets,
    dataclasses, namespaces, distributions and modules are searched recursively, and the modules' classes too; objects
    of other classes are not. Of ``tensors``, dtype, device, shape, strides and ``requires_grad`` are recorded.

    Arguments:
        modules: The modules.
        tensors: The tensors.
        keyed: Modules whose mode, training or evaluation, is ignored here, as it is part of the key.

    Attributes:
        held: The tensors that were found.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        tensors: Iterable[Tensor],
        keyed: Iterable[nn.Module] = (),
    ) -> None:
        self._entries: list[tuple[Mapping[str, Any], str, Any]] = []
        self._keys: list[tuple[dict, tuple]] = []
        self._classes: list[tuple[nn.Module, type]] = []
        self._values: list[tuple[Any, Any]] = []  # lists, sets and arrays, and copies of them
        self._seen: set[int] = set()
        self.held: list[Tensor] = []
        self._keyed = {id(module) for module in keyed}
        for module in modules:
            self._look_into(module)
        for hooks in _GLOBAL_HOOKS:
            self._watch(getattr(nn_module, hooks))
        self._empty = [mapping for mapping, keys in self._keys if not keys]
        self._keys = [(mapping, keys) for mapping, keys in self._keys if keys]
        self._kinds = [(x, _laid_out(x)) for x in tensors]

    def _watch(self, mapping: dict, ignored: Iterable[str] = (), grows: bool = False) -> None:
        if not grows:
            self._keys.append((mapping, tuple(mapping)))
        for name, value in mapping.items():
            if name not in ignored:
                self._entries.append((mapping, name, value))
                self._look_into(value)

    def _look_into(self, value: Any) -> None:
        """Record what a value holds, if it is of a kind that is searched."""
        if isinstance(value, (*_PLAIN, type, FunctionType)) or value is None or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.held.append(value)
        elif isinstance(value, nn.Module):
            self._watch_class(value)
            for part in _PARTS:
                self._watch(vars(value)[part])
            self._watch(vars(value), _IGNORED if id(value) in self._keyed else _IGNORED - {"training"})
        elif isinstance(value, list | tuple | set | deque | np.ndarray):
            self._look_through(value)
        elif isinstance(value, functools.partial):
            self._look_through((value.func, value.args, value.keywords))
        elif isinstance(value, dict):
            self._watch(value)
        elif isinstance(value, SimpleNamespace | Distribution) or is_dataclass(value) or _is_ours(value):
            self._watch(vars(value), grows=isinstance(value, Distribution))  # distributions cache what they computed

    def _watch_class(self, module: nn.Module) -> None:
        """Record a module's class and its attributes; of the classes of libraries, only ``forward``."""
        self._classes.append((module, type(module)))
        for kind in type(module).__mro__:
            if id(kind) not in self._seen:
                self._seen.add(id(kind))
                names = ("forward",) if kind.__module__.split(".")[0] in _LIBRARIES else vars(kind)
                self._entries += [(vars(kind), name, vars(kind)[name]) for name in names if name in vars(kind)]

    def _look_through(self, values: Any) -> None:
        if isinstance(values, np.ndarray):
            self._values.append((values, values.copy()))
            return
        if not isinstance(values, tuple):
            self._values.append((values, tuple(values)))
        for one in values:
            self._look_into(one)

    def holds(self) -> bool:
        """Whether nothing was replaced since."""
        return not self.changed() and all(_laid_out(x) == kind for x, kind in self._kinds)

    def changed(self) -> str:
        """The name of the first part that was replaced; empty if none was."""
        for mapping, name, value in self._entries:
            found = mapping.get(name, _GONE)
            if found is not value and not _is_equal(found, value):
                return repr(name)
        if any(type(module) is not kind for module, kind in self._classes):
            return "a module's class"
        if any(self._empty):
            return "what was empty"
        for mapping, keys in self._keys:
            if len(mapping) != len(keys) or tuple(mapping) != keys:
                return next((repr(name) for name in mapping if name not in keys), "what a dict holds")
        for value, copy in self._values:
            if isinstance(value, np.ndarray):
                same = value.shape == copy.shape and value.dtype == copy.dtype and value.tobytes() == copy.tobytes()
            else:
                same = len(value) == len(copy) and all(a is b or _is_equal(a, b) for a, b in zip(value, copy))  # noqa: B905
            if not same:
                return f"what a {type(value).__name__} holds"
        return ""


_GONE = object()
_PARTS: tuple[str, ...] = ("_parameters", "_modules", "_buffers", "_forward_hooks", "_forward_pre_hooks")
_PARTS += ("_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{part}" for part in _PARTS if part.endswith("hooks"))
_IGNORED = {*vars(nn.Module()), "_pyro_context", "_pyro_name"}
_LIBRARIES = {"torch", "pyro", "pyrodiff", "abc", "typing", "builtins"}
_PLAIN = (int, float, complex, str, bytes, bool)


def _laid_out(tensor: Tensor) -> tuple:
    return tensor.requires_grad, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _is_equal(ours: Any, theirs: Any) -> bool:
    return type(ours) is type(theirs) and isinstance(ours, _PLAIN) and ours == theirs and repr(ours) == repr(theirs)


def _is_ours(value: Any) -> bool:
    """Whether an object is an instance of one of this package's classes."""
    return type(value).__module__.startswith("pyrodiff.") and hasattr(value, "__dict__")


def _below(roots: list[nn.Module]) -> list[nn.Module]:
    """The modules and all of their submodules, each once."""
    return list({id(part): part for module in roots for part in module.modules()}.values())


def _closed_over(programs: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and values of tensors in variables that functions, and functions in these, read or close over."""
    seen, waiting = set(), list(programs)
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, nn.Module):
            waiting += [type(one).forward, *(value for value in vars(one).values() if callable(value))]
            continue
        if isinstance(one, MethodType):
            waiting.append(one.__func__)
            waiting += [value for value in vars(one.__self__).values() if callable(value)]
            continue
        if not isinstance(one, FunctionType):
            continue
        cells = zip(one.__code__.co_freevars, one.__closure__ or (), strict=True)
        read = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
        read |= {name: one.__globals__[name] for name in one.__code__.co_names if name in one.__globals__}
        for name, value in read.items():
            if isinstance(value, Tensor):
                yield repr(name), value
            elif isinstance(value, FunctionType | MethodType):
                waiting.append(value)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - it raises where there is none
    except ValueError:
        return False
    return True


@contextmanager
def as_written() -> Iterator[None]:
    """A context in which ``torch.compile`` is off, so that it does not trace global hooks."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
        yield


class Replayed:
    """A function of tensors as one CUDA graph, without a launch per kernel from Python.

    The graph reads and writes memory, not tensors: it is right for as long as all that the function reads and writes is
    where it was, which :meth:`fits` tells. The function must not synchronise with the device, and it must have run
    before, so that what it keeps between two calls is there.

    Arguments:
        function: Called with tensors, it returns tensors, in any nesting.
        args: Tensors of the kind that it will be called with, as :func:`kind_of` tells; none is expanded.
        state: The other tensors that it reads, and those that it changes, all on one device.
    """

    def __init__(self, function: Callable, args: tuple[Tensor, ...], state: list[Tensor]) -> None:
        held = {arg: torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device=arg.device) for arg in args}
        self._args = [held[arg].copy_(arg) for arg in args]  # one tensor may be given twice
        self._state, self._places = state, _places(state)  # the tensors too, lest others get their memory
        self._run = captured(lambda: function(*self._args), state[0].device)
        if not self.fits(state):
            raise RuntimeError("a tensor is moved to other memory")

    def fits(self, state: list[Tensor]) -> bool:
        """Whether these tensors, in their order, are those of the graph, and where they were.

        Arguments:
            state: What the function would read and change now.
        """
        return _places(state) == self._places and all(map(operator.is_, state, self._state))

    def __call__(self, *args: Tensor) -> Any:
        """What the function would return; the next call writes to the same memory."""
        for held, arg in zip(self._args, args, strict=True):
            held.copy_(arg)
        return self._run()


def _places(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A function that replays another's work on the device; its results are in the same memory each time.

    Arguments:
        function: The function, which is run once to be captured, without effect on the device.
        device: The device, whichever is the current one: work on others would not be captured.
    """
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            results = function()

    def replay() -> Any:
        graph.replay()
        return results

    return replay


class Graph:
    """The graph of a function's tensor operations, for arguments of one kind.

    Everything that it reads is an input of the graph, by reference: the arguments, the state of the modules, and any
    other tensor.

    Arguments:
        function: As of :class:`Compiled`.
        args: What it is called with.
        modules: The modules whose state is an input.
        tensors: Further tensors that are inputs.
        keyed: As of :class:`Composition`.

    Attributes:
        inputs: The tensors that it reads besides the arguments.
        draws_on: Where it makes random draws.
        changes_arguments: Whether it writes into an argument.
    """

    def __init__(
        self,
        function: Callable,
        args: tuple,
        modules: list[nn.Module],
        tensors: list[Tensor],
        keyed: list[nn.Module],
    ) -> None:
        state = [*_of(modules, "_parameters"), *_of(modules, "_buffers")]
        known = list({id(tensor): tensor for tensor in (*state, *tensors)}.values())
        args = _copied(args, {id(tensor) for tensor in known})
        given = _tensors(args)
        self.parts = Composition(modules, known, keyed=keyed)

        def run(*tracked: Tensor) -> tuple:
            with pyro.validation_enabled(False):  # validation reads values
                self.results = function(*args)
            return self.results

        versions = _versions(given)
        self.module = make_fx(run)(*given, *known)
        self.changes_arguments = _versions(given) != versions
        self.draws_on = _drawing_devices(self.module.graph)
        self.inputs, constants = _lifted(self.module, len(given), known)
        held = {id(tensor) for tensor in self.parts.held}
        self.unknown = [tensor for tensor in constants if id(tensor) not in held]
        self.given = given
        self._alike: list[int] | None = None

    def compile(self) -> None:
        """Compile it, for tensors like those that it was made with."""
        options = {  # fallback_random: a seed draws the same numbers as in the function
            "fallback_random": True,
            "post_grad_custom_pre_pass": _pass(),
        }
        if all(tensor.device.type == "cpu" for tensor in (*self.given, *self.inputs)):
            options["layout_optimization"] = False  # measured: slower by 5 % for convolutions forward and backward
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its internals
            self.code = torch._inductor.compile(self.module, [*self.given, *self.inputs], options=options)
        del self.module, self.given

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
    """The indices of results that share memory with an earlier one, as equal gradients do in a compiled graph."""
    places = [None if result is None else result.untyped_storage().data_ptr() for result in results]
    return [i for i, place in enumerate(places) if place is not None and place in places[:i]]


def _merge_alike(graph: fx.Graph) -> None:
    """Merge equal operations, as gradients often have: inductor 2.13 fails where a bfloat16 sum is stored twice."""
    found: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.is_impure():
            continue
        first = found.setdefault(f"{node.target}{node.args}{node.kwargs}", node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _pass() -> object:
    """:func:`_merge_alike` as a pass of inductor; made here, since inductor takes seconds to import."""
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


def _drawing_devices(graph: fx.Graph) -> set[torch.device]:
    draws = [node for node in graph.nodes if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())]
    drawn = tree_flatten([node.meta.get("val") for node in draws])[0]
    return {tensor.device for tensor in drawn if isinstance(tensor, Tensor)}


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _copied(args: tuple, taken: set[int]) -> tuple:
    """The arguments, with copies of those that are also state, as at a later call they may be other tensors."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and id(leaf) in taken else leaf, args)


def _of(modules: list[nn.Module], kind: str) -> list[Tensor]:
    """The ``_parameters`` or ``_buffers`` of the modules themselves."""
    return [tensor for module in modules for tensor in getattr(module, kind).values() if tensor is not None]


def _lifted(module: fx.GraphModule, num_given: int, known: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Turn the constants of a graph into inputs, and drop unused inputs, except for arguments.

    Returns:
        The inputs after the arguments, and those of them that were constants, but not literals in the function.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    inputs, constants = [], []
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
            if not all(user.target is torch.ops.aten.lift_fresh_copy.default for user in node.users):
                constants.append(tensor)
        node.replace_all_uses_with(found[id(tensor)])
        module.graph.erase_node(node)
    module.recompile()
    return inputs, constants


def _snapshot(modules: list[nn.Module]) -> Callable[[], None]:
    """Keep the state of the random generators and of the buffers; returns a function that restores them."""
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
    """Why a program cannot be traced: the operation, the line of the program, and the last site before it."""
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
