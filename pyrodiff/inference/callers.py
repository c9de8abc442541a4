"""Refusals by caller: inference algorithms for which an unbiased estimate of a bound is not enough."""

import sys
from collections.abc import Iterator
from types import CodeType, FrameType

import torch
from pyro import poutine
from pyro.infer import WeighedPredictive
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from ..base.arguments import ArgumentError

__all__ = ["is_pyros_step", "refuse_callers", "refuse_in_guide"]


_ONE_STEP = "estimate must not be a OneStepEstimate"
_WAY_OUT = "give DiffusionDistribution(..., estimate=FlowEstimate())"
_IN_A_LOGARITHM = f", inside a logarithm, where it would no longer have the right mean: {_WAY_OUT}"
_FIXED = f", which wants a density that is the same number each time: {_WAY_OUT}"
# How the module's name starts, which function (None: any), and the end of the error message.
_NOT_SUMS: tuple[tuple[str, str | CodeType | None, str], ...] = (
    ("pyro.infer.mcmc", None, "HMC or NUTS" + _FIXED),
    ("pyro.infer.autoguide.guides", "laplace_approximation", "AutoLaplaceApproximation" + _FIXED),
    ("pyro.infer.renyi_elbo", None, "RenyiELBO" + _IN_A_LOGARITHM),
    ("pyro.infer.importance", None, "Importance" + _IN_A_LOGARITHM),
    ("pyro.infer.predictive", WeighedPredictive.forward.__code__, "WeighedPredictive" + _IN_A_LOGARITHM),
    ("pyro.infer.smcfilter", None, "SMCFilter" + _IN_A_LOGARITHM),
    ("pyro.infer.resampler", None, "Resampler" + _IN_A_LOGARITHM),
    ("pyro.infer.rws", None, "ReweightedWakeSleep" + _IN_A_LOGARITHM),
    ("pyro.infer.tracetmc_elbo", None, "TraceTMC_ELBO" + _IN_A_LOGARITHM),
    ("pyro.infer.trace_tail_adaptive_elbo", None, "TraceTailAdaptive_ELBO" + _IN_A_LOGARITHM),
    ("pyro.infer.discrete", None, "infer_discrete" + _IN_A_LOGARITHM),
    ("pyrodiff.likelihood.pairs", "log_weights", "pair_importance_bound" + _IN_A_LOGARITHM),
)


def refuse_callers(diffusion: nn.Module, is_bound: bool, shape: torch.Size) -> None:
    """Refuse to be scored by an inference algorithm for which the estimate is not valid.

    Arguments:
        diffusion: The diffusion, whose parameters Pyro's SVI should find.
        is_bound: Whether the estimate has a bound as its mean, and so may only be summed.
        shape: The shape of the log density.

    Raises:
        ValueError: If the calling inference algorithm needs more than such an estimate, or would learn nothing.
    """
    in_guide = False
    for frame, homes in _callers():
        module, function = homes[0], frame.f_code.co_name
        if function == "compute_log_prob" and "site" in frame.f_locals:
            shape = _scored_shape(frame.f_locals["site"], shape)
        if (module, function) == ("pyro.infer.enum", "get_importance_trace") and "model_trace" in frame.f_locals:
            guide_trace, model_trace = (frame.f_locals[name] for name in ("guide_trace", "model_trace"))
            _refuse_unheard(diffusion, [guide_trace, model_trace])
            if is_bound and _enumerates(guide_trace, model_trace, shape):
                raise ValueError(f"{_ONE_STEP} of a class that is enumerated in the model{_IN_A_LOGARITHM}")
        for start, at, name in _NOT_SUMS if is_bound else ():
            if at in (None, function, frame.f_code) and any(home.startswith(start) for home in homes):
                raise ValueError(f"{_ONE_STEP} in {name}")
        in_guide = in_guide or (module, function) == ("pyro.poutine.trace_struct", "compute_score_parts")
    if in_guide:
        refuse_in_guide(is_bound)


def refuse_in_guide(is_bound: bool) -> None:
    """Refuse to be the distribution of a guide's site if log p is a bound.

    Arguments:
        is_bound: Whether it is.

    Raises:
        ValueError: If so.
    """
    if is_bound:
        raise ValueError(
            f"{_ONE_STEP} as the law of a guide's site, where a bound on log q would raise the ELBO above what it "
            f"bounds: {_WAY_OUT}"
        )


def _refuse_unheard(diffusion: nn.Module, traces: list[poutine.Trace]) -> None:
    """Refuse a step of Pyro's SVI that would silently learn nothing."""
    heard = any(site["type"] == "param" for trace in traces for site in trace.nodes.values())
    learns = any(parameter.requires_grad for parameter in diffusion.parameters())
    if learns and not heard and is_pyros_step():
        raise ArgumentError(
            "diffusion",
            "must be seen by the programs where nothing else is learned, or Pyro's SVI takes no gradient:"
            " make the DiffusionDistribution in the model, or in a plate, or train by pyrodiff.SVI",
        )


def _callers() -> Iterator[tuple[FrameType, list[str]]]:
    """The call stack of the density, out to the inference algorithm, but not beyond.

    Each frame comes with the name of its module and, for a method of Pyro's algorithms, the modules of its object's
    classes.
    """
    frame: FrameType | None = sys._getframe(2)
    entered = False
    while frame is not None:
        homes = [frame.f_globals.get("__name__", "")]
        is_pyros = homes[0].startswith("pyro.infer")
        if entered and not homes[0].startswith(("pyro.", "pyrodiff.", "torch.", "contextlib", "functools")):
            return
        entered = entered or is_pyros or homes[0].startswith("pyrodiff.likelihood")
        if is_pyros and "self" in frame.f_locals:
            homes += [kind.__module__ for kind in type(frame.f_locals["self"]).__mro__]
        yield frame, homes
        frame = frame.f_back


def _scored_shape(site: dict, shape: torch.Size) -> torch.Size:
    """The shape of a site's score: masks, scales or distributions around this one may broadcast it."""
    around = [site[handler].shape for handler in ("mask", "scale") if isinstance(site[handler], Tensor)]
    return torch.broadcast_shapes(shape, site["fn"].batch_shape, *around)


def _enumerates(guide_trace: poutine.Trace, model_trace: poutine.Trace, shape: torch.Size) -> bool:
    """Whether a result of this shape has the dimension of a site that is enumerated in the model (not in the guide)."""
    sites = [site for name, site in model_trace.nodes.items() if name not in guide_trace.nodes]
    dims = [(site["infer"] or {}).get("_enumerate_dim") for site in sites if site["type"] == "sample"]
    return any(dim is not None and -dim <= len(shape) and shape[dim] > 1 for dim in dims)


def is_pyros_step() -> bool:
    """Whether Pyro's own SVI is collecting parameters."""
    return any(isinstance(frame, TraceMessenger) and frame.param_only for frame in _PYRO_STACK)
