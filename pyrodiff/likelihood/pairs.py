r"""The bound on the likelihood of any two Pyro programs with a plate of data, site by site and datum by datum.

These are for a pair written by hand what :func:`bound` and :func:`importance_bound` are for a :class:`Diffusion`. With
z the latent sites in the plate of the data, w those outside of it, which all data share, and :math:`x_i` what the model
observes of datum i,

.. math::
    -\log p(x_1, \dots, x_B) \;\le\; \mathbb{E}_q KL(q(w) \| p(w)) + \sum_{i=1}^{B} \mathbb{E}_q
        \log \frac{q(z_i | w, x_i)}{p(x_i, z_i | w)}

The sum over i splits into a cost per datum, and this into one per site, the terms of :class:`DiffusionELBO`. The first
term belongs to no datum, and is reported separately.

The programs are run as they are, on ``batch_size`` neighbouring data at a time, and the seed of each run is derived
from the given seed, the particle and the number of the run. So the draws depend on the seed, the position of the data
and ``batch_size``, but not on how a loader batches them. More is not possible with unknown programs: the data of one
run share its stream of draws.

References:
    Importance Weighted Autoencoders (Burda et al., 2016), https://arxiv.org/abs/1509.00519
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.module import register_module_forward_pre_hook

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64, precisely
from ..base.randomness import forked, seed_of
from ..pair.diffusion import Diffusion, OneStep
from ..pair.elbo import DiffusionELBO
from ..pair.entropy import innermost
from ..process.quantization import number_of_values
from ..running.compilation import as_written
from ..running.evaluation import expect, progress_bar, seeded
from .bounds import ImportanceBound
from .estimate import Likelihood
from .psis import warn_of_tails

__all__ = ["PairBound", "pair_bound", "pair_importance_bound"]

_CPU = torch.device("cpu")
_ROWS, _END = 12, 4  # the most sites that a table shows one by one; with more, so many at either end


@dataclass(frozen=True, repr=False, eq=False)
class PairBound(Likelihood):
    """The costs of the sites of a pair, in nats, which add up to a bound on -log p. Printed, it is a table.

    Arguments:
        names: The S sites in the plate of the data, in the model's order.
        kinds: The kind of each: "latent", whose cost is the KL or log q - log p at the draw; "observed", -log p; or
            "auxiliary", log q, for a site that only the guide has.
        costs: Their costs, each the mean over particles, with shape (S, B).
        event_shape: The shape of one datum of ``x_0``.
        levels: How many values each dimension may take, if p is a probability: the largest number of any observed site,
            or infinity; None if p is a density.
        global_names: The sites outside of that plate, in the model's order.
        global_costs: Their costs; all data share them, so they are not part of ``nats``.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    costs: Tensor
    event_shape: torch.Size
    levels: int | float | None = None
    global_names: tuple[str, ...] = ()
    global_costs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("names", "kinds", "global_names", "global_costs"):  # a loaded file has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def nats(self) -> Tensor:
        return self.costs.sum(0)

    @property
    def terms(self) -> dict[str, Tensor]:
        """The cost of each site in the plate of the data, in nats, with shape (B,)."""
        return dict(zip(self.names, self.costs, strict=True))

    @property
    def global_terms(self) -> dict[str, Tensor]:
        """The cost of each site outside of that plate, once for all data, in nats, with shape ()."""
        return {
            name: self.costs.new_tensor(cost) for name, cost in zip(self.global_names, self.global_costs, strict=True)
        }

    @property
    def total(self) -> float:
        """The cost of all data together, in nats: the sum over the data, plus the shared costs once.

        In expectation over draws it is a bound on -log p(x_1, ..., x_B), with all latent sites integrated out.
        """
        return float(float64(self.nats).sum()) + sum(self.global_costs)

    @property
    def title(self) -> str:
        return f"bound on -log p of a pair, {len(self.names)} site{'s' * (len(self.names) != 1)}"

    def _raised(self, nats: float) -> dict[str, Tensor]:
        at = torch.tensor([kind == "observed" for kind in self.kinds], device=self.costs.device).int().argmax()
        return {"costs": self.costs.index_add(0, at[None], torch.full_like(self.costs[:1], nats))}

    def rows(self) -> dict[str, Tensor]:
        named = zip(self.kinds, self.names, self.costs, strict=True)
        rows = [(f"{kind:9} {name}", cost) for kind, name, cost in named]
        if len(rows) > _ROWS:
            between = f"{'sum of':9} {self.names[_END]} .. {self.names[-_END - 1]}", self.costs[_END:-_END].sum(0)
            rows = [*rows[:_END], between, *rows[-_END:]]
        shared = {f"{'global':9} {name}": cost for name, cost in self.global_terms.items()}
        return {**dict(rows), "bound": self.nats, **shared}

    @classmethod
    def joined(cls, parts: list["PairBound"]) -> "PairBound":
        """The bound of all the data of several bounds of one pair; shared costs are averaged.

        Arguments:
            parts: The bounds, at least one.

        Raises:
            ValueError: If they differ in sites, levels or shapes, and so cannot be of one pair.
        """
        sizes = [len(part.nats) / sum(len(part.nats) for part in parts) for part in parts]
        found = {part.global_names: part.global_costs for part in parts}
        if len(found) == 1:
            every = zip(*(part.global_costs for part in parts), strict=True)
            means = tuple(sum(size * cost for size, cost in zip(sizes, costs, strict=True)) for costs in every)
            parts = [part.changed(global_costs=means) for part in parts]
        return super().joined(parts)


@torch.no_grad()
def pair_bound(
    model: Callable,
    guide: Callable,
    x_0: Tensor | Iterable,
    *context: Tensor,
    plate: str = "data",
    num_particles: int = 1,
    batch_size: int = 256,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
) -> PairBound:
    """The bound on -log p(x) of two Pyro programs: a cost per site and datum, estimated with fresh draws.

    Both programs are called as ``program(x_0, *context)`` with some of the data, and have a plate of that size. Their
    costs are those of :meth:`DiffusionELBO.terms`, with the scales and masks of the programs: a constant scale
    multiplies every number, and the 1 / p(t) of a one-step pair makes it unbiased. A cost in further plates is summed
    over these. Modules that the programs call are in evaluation mode meanwhile; Pyro's param store and torch's random
    state are restored afterwards.

    Sites outside of the plate are drawn anew in each run, so costs given them are averaged over them too. Their guide
    must not depend on the data, unless ``batch_size`` holds all data.

    Arguments:
        model: A program that observes the data.
        guide: A program that draws the latent sites of the model, in any order.
        x_0: The data, with shape (B, *event_shape); or a loader of such batches, or of tuples of one and its context,
            on the device of the programs.
        *context: Further arguments of the programs: tensors of B rows, or of one for all; for a guide with parameters
            per datum, the indices of the data, say.
        plate: The name of the plate of the data.
        num_particles: The number of runs over which a cost is averaged.
        batch_size: How many data a run has. All sites of a run are held in memory. The draws depend on this number.
        generator: A generator or a seed, for the same number each time; torch's global generator if not given.
        progress: Whether to show a progress bar, where there is a terminal.

    Returns:
        The costs in nats, per datum, and the shared ones.

    Raises:
        ValueError: If ``x_0`` is no data or an empty loader, or a number is not a positive int; if the programs have no
            such plate, or it does not have one row per datum; if the model observes nothing in it, or its distributions
            there have no support to tell whether p is a probability or a density, or are of both kinds; if the pair has
            no bound (:class:`DiffusionELBO`).

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> bound = pyrodiff.pair_bound(model, guide, torch.randn(50), num_particles=10)
        >>> {name: tuple(cost.shape) for name, cost in bound.terms.items()}, bound.convention
        ({'z': (50,), 'x': (50,)}, 'p is a density, per unit of the data as given')
    """
    num_particles, pair = arguments.positive_int("num_particles", num_particles), _Pair(model, guide, plate)
    batches = _batches(x_0, context, arguments.positive_int("batch_size", batch_size))
    costs: list[dict[str, Tensor]] = []
    shared: dict[str, float] = {}
    runs = 0
    with pair.evaluated(), seeded(generator, _CPU) as seed, progress_bar(progress, "bound") as bar:
        for number, data in enumerate(batches):
            costs.append({})
            for particle in range(num_particles):
                with _run(seed_of(seed, particle, number), data[0].device, validated=particle == 0):
                    for name, cost in pair.terms(data).items():
                        if cost.dim() == 0:
                            shared[name] = shared.get(name, 0.0) + float(cost)
                        else:
                            costs[-1][name] = costs[-1].get(name, 0) + cost / num_particles
                _tell(bar, x_0, num_particles, len(data[0]))
                runs += 1
    names = [name for name in pair.kinds if any(name in block for block in costs)]  # a run may lack some sites
    sizes = [next(iter(block.values())) for block in costs]
    rows = [
        torch.cat([block.get(name, torch.zeros_like(size)) for block, size in zip(costs, sizes, strict=True)])
        for name in names
    ]
    return PairBound(
        names=tuple(names),
        kinds=tuple(pair.kinds[name] for name in names),
        costs=torch.stack(rows),
        event_shape=data[0].shape[1:],
        levels=pair.levels,
        global_names=tuple(shared),
        global_costs=tuple(cost / runs for cost in shared.values()),
    )


@torch.no_grad()
def pair_importance_bound(
    model: Callable,
    guide: Callable,
    x_0: Tensor | Iterable,
    *context: Tensor,
    plate: str = "data",
    num_particles: int | None = None,
    batch_size: int = 256,
    generator: torch.Generator | int | None = None,
    progress: bool = False,
) -> ImportanceBound:
    r"""The importance-weighted bound of two Pyro programs: tighter the more particles, and -log p(x) in the limit.

    .. math:: -\log p(x_i) \le -\mathbb{E}_q \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_i^{(k)})}{q(z_i^{(k)} | x_i)}

    A weight is the product over all sites of a datum; auxiliary sites of the guide are in the denominator. So each site
    has to belong to a datum: a latent outside of the plate is shared by all data, which then have one weight together.
    A scale makes no sense inside of the logarithm; masks are kept.

    Arguments:
        model, guide, x_0, *context, plate, batch_size, generator, progress: As :func:`pair_bound`.
        num_particles: The number K of runs, each of which gives each datum a weight; one more checks the programs.

    Returns:
        The log weights and the bound made of them.

    Raises:
        ValueError: As :func:`pair_bound`; if a site with a cost is outside of the plate, or has a scale.
        UserWarning: If K is at least 100 and Pareto's k (:func:`pareto_k`) of the weights of some data above 0.7.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), Eq. 8, https://arxiv.org/abs/1509.00519

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.0))
        >>> bound = pyrodiff.pair_importance_bound(model, guide, torch.randn(50), num_particles=100)
        >>> bound.log_weights.shape, bool(bound.mean < bound.at(1).mean())
        (torch.Size([100, 50]), True)
    """
    _refuse_options(context)
    K, pair, weights = arguments.positive_int("num_particles", num_particles), _Pair(model, guide, plate), []
    batches = _batches(x_0, context, arguments.positive_int("batch_size", batch_size))
    with pair.evaluated(), seeded(generator, _CPU) as seed, progress_bar(progress, "importance bound") as bar:
        for number, data in enumerate(batches):
            with _run(seed_of(seed, 0, number), data[0].device, validated=True), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the guide draws sites in another order")  # here any order will do
                pair.check_weights(data)
            for particle in range(K):
                with _run(seed_of(seed, particle, number), data[0].device, validated=False):
                    weights.append(pair.log_weights(data))
                _tell(bar, x_0, K, len(data[0]))
    together = torch.cat([torch.stack(weights[i : i + K]) for i in range(0, len(weights), K)], 1)
    found = ImportanceBound(together, data[0].shape[1:], pair.levels)
    warn_of_tails(found.pareto_k, K)
    return found


class _Heard:
    """A program that keeps the trace of its last run.

    Arguments:
        program: The program.
    """

    def __init__(self, program: Callable) -> None:
        self.program = program

    def __call__(self, *args: Tensor) -> Any:
        with poutine.trace() as heard:
            returned = self.program(*args)
        self.trace = heard.trace
        return returned

    def sites(self) -> dict[str, Any]:
        """The sites by name, without deterministic ones."""
        nodes: dict[str, Any] = prune_subsample_sites(self.trace).nodes
        return {
            name: site
            for name, site in nodes.items()
            if site["type"] == "sample" and not site["infer"].get("_deterministic")
        }


class _Pair:
    """Two programs, and what their runs have shown of their sites.

    Arguments:
        model, guide: The programs.
        plate: The name of the plate of the data.

    Attributes:
        kinds: The kind of each site with a cost, by name, in the model's order.
    """

    def __init__(self, model: Callable, guide: Callable, plate: str) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if isinstance(program, Diffusion | OneStep) or not callable(program):
                hint = f", its {name}: give .{name} of it" * isinstance(program, Diffusion | OneStep)
                raise ArgumentError(name, f"must be a program{hint}, but it is {arguments.described(program)}")
        arguments.text("plate", plate)
        self.model, self.guide, self.plate, self.elbo = _Heard(model), _Heard(guide), plate, DiffusionELBO()
        self.kinds: dict[str, str] = {}
        self._levels: dict[str, set] = {}

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """A context with all modules that are called in evaluation mode; it restores Pyro's param store."""
        store = pyro.get_param_store()
        seen: set[nn.Module] = set()
        training: list[nn.Module] = []

        def still(module: nn.Module, args: object = None) -> None:
            if module in seen:
                return
            for part in module.modules():
                seen.add(part)
                if part.training:
                    training.append(part)
                    part.training = False

        def back() -> None:
            for part in training:
                part.training = True

        with ExitStack() as stack:
            stack.callback(back)
            stack.callback(register_module_forward_pre_hook(still).remove)
            for program in (self.model.program, self.guide.program):
                owner = getattr(program, "__self__", program)  # the object of a method
                if isinstance(owner, nn.Module):
                    still(owner)
            stack.enter_context(as_written())
            stack.enter_context(store.scope(store.get_state()))
            yield

    def terms(self, data: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The cost of each site in one run: with shape (B,) in the plate of the data, and () outside of it."""
        terms = self.elbo.terms(self.model, self.guide, *data)
        sites = {**self.guide.sites(), **self.model.sites()}
        self._check_plate(sites, len(data[0]))
        for name in terms:
            is_of_model, is_observed = name in self.model.trace.nodes, sites[name]["is_observed"]
            self.kinds[name] = "auxiliary" if not is_of_model else "observed" if is_observed else "latent"
        observed = [name for name in terms if self.kinds[name] == "observed" and self._frame(sites[name])]
        self._count_levels({name: sites[name]["fn"] for name in observed})
        return {name: self._of_data(cost, sites[name]) for name, cost in terms.items()}

    def check_weights(self, data: tuple[Tensor, ...]) -> None:
        """Run a pair, and refuse it if data have no weights of their own."""
        for name, cost in self.terms(data).items():
            if cost.dim() == 0:
                raise ValueError(
                    f"plate {self.plate!r} must hold every site with a cost for an importance-weighted bound per "
                    f"datum, but {name!r} stands outside of it: what all data share leaves no datum a weight of its own"
                )
        for name, site in {**self.guide.sites(), **self.model.sites()}.items():
            if site["mask"] is not False and not bool((torch.as_tensor(site["scale"]) == 1).all()):
                raise ArgumentError(
                    "scale",
                    f"must be 1 at every site for an importance-weighted bound, but at {name!r} it is another: "
                    f"inside of the logarithm it makes no sense",
                )

    def log_weights(self, data: tuple[Tensor, ...]) -> Tensor:
        """log p - log q of a run, the sum over all sites, with shape (B,)."""
        self.guide(*data)
        poutine.replay(self.model, trace=self.guide.trace)(*data)
        drawn = [(-1, site) for site in self.guide.sites().values() if not site["is_observed"]]
        total = torch.zeros((), device=data[0].device)
        for sign, site in [*drawn, *((1, site) for site in self.model.sites().values())]:
            if site["mask"] is not False:
                with precisely():
                    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), mask=site["mask"])
                total = total + sign * self._of_data(log_prob, site)
        return total

    @property
    def levels(self) -> int | float | None:
        """How many values each dimension may take, the maximum over observed sites; None for a density."""
        return max(((levels for found in self._levels.values() for levels in found)), key=lambda n: n or 0)

    def _frame(self, site: dict) -> Any:
        """The plate of the data around a site, if there is one."""
        return next((frame for frame in site["cond_indep_stack"] if frame.name == self.plate), None)

    def _of_data(self, cost: Tensor, site: dict) -> Tensor:
        """The cost summed over all plates except that of the data."""
        frame, cost = self._frame(site), cost.expand(torch.broadcast_shapes(cost.shape, site["fn"].batch_shape))
        return cost.sum() if frame is None else cost.movedim(frame.dim, 0).reshape(frame.size, -1).sum(1)

    def _check_plate(self, sites: dict[str, dict], size: int) -> None:
        frames = {frame.name: frame for site in sites.values() for frame in site["cond_indep_stack"]}
        frame = frames.get(self.plate)
        if frame is None:
            found = f"their plates are {', '.join(map(repr, frames))}" if frames else "there is none"
            raise ArgumentError(
                "plate", f"must be the name of the programs' plate of the data, but it is {self.plate!r}, and {found}"
            )
        if not frame.vectorized:
            raise ValueError(f"plate {self.plate!r} must be a context, with pyro.plate(...), but it is a loop")
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"plate {self.plate!r} must hold the data that the programs are called with, each of them once, but it "
                f"draws {frame.size} of {frame.full_size}, and counts each {frame.full_size / frame.size:g} times: "
                f"make it pyro.plate({self.plate!r}, len(x_0))"
            )
        if frame.size != size:
            raise ValueError(
                f"plate {self.plate!r} must hold the data that the programs are called with, {size} in this run, but "
                f"its size is {frame.size}: make it pyro.plate({self.plate!r}, len(x_0)), or let a run have all data, "
                f"batch_size=len(x_0)"
            )

    def _count_levels(self, laws: dict[str, Distribution]) -> None:
        """Record how many values observed sites may take; refuse a mix of probabilities and densities."""
        for name, law in laws.items():
            if not isinstance(innermost(law), Unit):  # a pyro.factor is no distribution of data
                self._levels.setdefault(name, set()).update(_levels_of(name, law))
        if not self._levels:
            raise ArgumentError(
                "model", f"must observe the data in plate {self.plate!r}, but no observed site stands in it"
            )
        found = {name: {levels is None for levels in levels} for name, levels in self._levels.items()}
        if len(set.union(*found.values())) > 1:
            dense = ", ".join(repr(name) for name, is_density in found.items() if True in is_density)
            raise ArgumentError(
                "model",
                f"must give all that it observes a density, or all a probability, but there is a density at "
                f"{dense} and none at {', '.join(repr(name) for name in found if False in found[name])}: their product "
                f"is neither; give one of them as context instead",
            )


def _levels_of(name: str, law: Distribution) -> set[int | float | None]:
    """How many values the numbers of an observed site may take; None for a density."""
    try:
        supports: list[Any] = [law.support]
        found: set[int | float | None] = set()
        while supports:
            support = supports.pop()
            if hasattr(support, "cseq"):  # several constraints, concatenated
                supports += support.cseq
            elif hasattr(support, "base_constraint"):
                supports.append(support.base_constraint)
            else:
                found.add(number_of_values(support))
        return found
    except NotImplementedError as error:
        raise ValueError(
            f"the law of observed site {name!r} must say its support, since p is a probability where that is discrete "
            f"and a density elsewhere, but {type(innermost(law)).__name__} says none"
        ) from error


def _batches(x_0: Tensor | Iterable, context: tuple, size: int) -> Iterator[tuple[Tensor, ...]]:
    """The data and their context, ``size`` rows at a time, however they are batched."""
    waiting: tuple[Tensor, ...] | None = None
    for data in _given(x_0, context):
        if waiting is not None and [v.shape[1:] for v in waiting] != [v.shape[1:] for v in data]:
            raise ValueError(
                f"the batches of a loader must be alike, but their shapes, without the first dimension, are "
                f"{[tuple(v.shape[1:]) for v in waiting]} and {[tuple(v.shape[1:]) for v in data]}"
            )
        waiting = data if waiting is None else tuple(map(torch.cat, zip(waiting, data, strict=True)))
        while len(waiting[0]) >= size:
            yield tuple(values[:size] for values in waiting)
            waiting = tuple(values[size:] for values in waiting)
    if waiting is None:
        raise ArgumentError("x_0", f"must have at least one batch, but this {type(x_0).__name__} is empty")
    if len(waiting[0]) > 0:
        yield waiting


def _given(x_0: Tensor | Iterable, context: tuple) -> Iterator[tuple[Tensor, ...]]:
    """The batches of the data, checked: a tensor is one batch, anything else is a loader."""
    if isinstance(x_0, Tensor) or not isinstance(x_0, Iterable) or hasattr(x_0, "__array__") or isinstance(x_0, str):
        yield _checked(x_0, context)
        return
    if context:
        _refuse_options(context)
        raise ArgumentError("context", "must come from the loader, which yields (x_0, y), but it is given beside one")
    for number, batch in enumerate(x_0):
        try:
            some, *known = batch if isinstance(batch, tuple | list) and batch else (batch,)
            yield _checked(some, tuple(known))
        except ValueError as error:
            raise arguments.amended(error, f"(in batch {number} of the loader)") from None


def _refuse_options(context: tuple) -> None:
    """Refuse a context that is not a tensor, before other checks."""
    checks.context([value for value in context if not isinstance(value, Tensor)], 1, _CPU, "num_particles")


def _checked(x_0: object, context: tuple) -> tuple[Tensor, ...]:
    hint = ": give torch.from_numpy(x_0)" * hasattr(x_0, "__array__")
    if not isinstance(x_0, Tensor):
        raise ArgumentError("x_0", f"must be a tensor, or a loader of such, but it is {arguments.described(x_0)}{hint}")
    if x_0.dim() == 0 or len(x_0) == 0:
        raise ArgumentError(
            "x_0", f"must have shape (B, *event_shape) with B >= 1, but its shape is {tuple(x_0.shape)}"
        )
    checks.context(context, len(x_0), x_0.device, "num_particles")
    return (x_0, *(values.expand(len(x_0), *values.shape[1:]) for values in context))


@contextmanager
def _run(seed: int, device: torch.device, validated: bool) -> Iterator[None]:
    """The context of a run: its own seed, on the CPU and on a device, and validation by Pyro on or off."""
    with forked(seed, device), pyro.validation_enabled(validated):
        yield


def _tell(bar: Any, x_0: Tensor | Iterable, num_particles: int, rows: int) -> None:
    """Update a progress bar after a run."""
    if isinstance(x_0, Tensor):  # the number of data in a loader is unknown
        expect(bar, x_0, num_particles * len(x_0))
    bar.update(rows)
