"""From a plan to the model: numbers and levels diffuse by Gaussian noise, bits by flips."""

import torch
from torch import Tensor, nn

from .. import networks
from ..base.arguments import ArgumentError
from ..model.decoders import DiscretizedDecoder
from ..model.denoisers import (
    DataPrediction,
    Denoiser,
    LevelPrediction,
    LogitPrediction,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
)
from ..model.reverse import BinomialReverse, GaussianReverse
from ..model.variances import ForwardVariance, PosteriorVariance
from ..pair.diffusion import Diffusion, OneStep, evenly_spaced
from ..pair.times import Drawing, LossSecondMoment, LowDiscrepancyDrawing, SimpleWeighting, UniformDrawing
from ..process.forward import BinomialForward, GaussianForward
from ..process.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule, ReciprocalSchedule, Schedule
from ..sampling.ancestral import AncestralSampler
from ..sampling.flow import FlowSampler
from ..sampling.sampler import Sampler
from ..sampling.solvers import DDIMSampler, DPMSolverSampler, HeunSampler, PredictorCorrectorSampler
from .data import Form
from .options import Model, Plan

__all__ = ["build", "pair", "shortened"]

SAMPLERS: dict[str, type[Sampler]] = {  # by their names on the command line
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "dpm": DPMSolverSampler,
    "heun": HeunSampler,
    "pc": PredictorCorrectorSampler,
    "flow": FlowSampler,
}

_PREDICTIONS: dict[str, type[Denoiser]] = {
    "noise": NoisePrediction,
    "data": DataPrediction,
    "velocity": VelocityPrediction,
    "score": ScorePrediction,
}


def build(plan: Plan, form: Form, often: Tensor | None = None) -> Diffusion:
    """The model.

    Arguments:
        plan: The plan.
        form: The form of the data.
        often: The frequency of each level at each number, where the network starts from that; uniform if not given.
    """
    model = plan.model
    if form.read_as == "bits":
        flips = BinomialForward(_schedule(model), 0.5 if form.rate is None else form.rate)
        return Diffusion(flips, BinomialReverse(flips, LogitPrediction(_network(model, form), flips)), form.event_shape)
    process = GaussianForward(_schedule(model))
    denoiser: Denoiser
    if model.prediction == "level" and form.levels is not None:
        often = torch.full((*form.event_shape, form.levels), 1 / form.levels) if often is None else often
        network = networks.Offset(_network(model, form, form.levels), often.log().cpu())
        denoiser = LevelPrediction(network, process, form.levels)
    else:
        denoiser = _PREDICTIONS[model.prediction](_network(model, form), process)
    variance = ForwardVariance() if model.variance == "forward" else PosteriorVariance()
    reverse = GaussianReverse(process, denoiser, variance)
    if form.levels is None:
        return Diffusion(process, reverse, form.event_shape)
    return Diffusion(process, reverse, form.event_shape, DiscretizedDecoder(form.levels))


def _schedule(model: Model) -> Schedule:
    if model.log_snr_first is not None and model.log_snr_last is not None:
        return LogSNRSchedule(model.T, model.log_snr_first, model.log_snr_last)
    kinds: dict[str, type[Schedule]]
    kinds = {"linear": LinearSchedule, "cosine": CosineSchedule, "reciprocal": ReciprocalSchedule}
    return kinds[model.schedule](model.T)


def _network(model: Model, form: Form, outputs: int | None = None) -> nn.Module:
    if model.channels is not None:
        attention = () if model.attention in (None, (0,)) else model.attention
        sizes = (model.channels, model.hidden, model.blocks, model.dropout)
        return networks.UNet(form.event_shape, *sizes, outputs, attention=attention, classes=form.classes)
    frequency = 3.0 if form.event_shape.numel() <= 20 else 0.0  # sines overfit where there are many dimensions
    sizes_of_mlp = (model.hidden, model.blocks, model.dropout, frequency)
    return networks.MLP(form.event_shape, *sizes_of_mlp, classes=form.classes)


def pair(plan: Plan, diffusion: Diffusion) -> OneStep:
    """The pair of programs that is trained.

    Arguments:
        plan: The plan.
        diffusion: The model.
    """
    drawing: Drawing
    if plan.training.drawing == "loss-second-moment":
        drawing = LossSecondMoment(diffusion.num_steps)
    else:
        drawing = UniformDrawing() if plan.training.drawing == "uniform" else LowDiscrepancyDrawing()
    weighting = None
    if plan.training.weighting == "simple" and isinstance(diffusion.reverse, GaussianReverse):
        weighting = SimpleWeighting(diffusion.reverse)
    return diffusion.one_step(drawing, weighting)


def shortened(diffusion: Diffusion, steps: int | None, argument: str) -> Diffusion:
    """The diffusion in fewer steps.

    Arguments:
        diffusion: The diffusion.
        steps: How many of its T steps; all if not given.
        argument: The option that asks for it, for errors.

    Raises:
        ArgumentError: If there are more than T.
    """
    T = diffusion.num_steps
    if steps is not None and steps > T:
        raise ArgumentError(argument, f"must be at most {T}, those of the run, but it is {steps}")
    return diffusion if steps in (None, T) else diffusion.subchain(evenly_spaced(steps, T))
