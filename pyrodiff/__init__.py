"""Diffusion models as pairs of Pyro programs, with a bound on the likelihood that is exact term by term."""

from . import checkpoints, datasets, networks, plots
from .accounting import VarianceAccount, variance_account
from .bounds import Bound, ImportanceBound, bound, importance_bound
from .decoders import Decoder, DiscretizedDecoder, GaussianDecoder, SoftmaxDecoder, TransitionDecoder
from .denoisers import (
    DataPrediction,
    Denoiser,
    LevelPrediction,
    LogitPrediction,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
)
from .diffusion import Diffusion, OneStep
from .elbo import DiffusionELBO
from .flows import FlowLikelihood, ode_log_prob
from .forward import BinomialForward, Forward, GaussianForward
from .likelihoods import Likelihood
from .quantization import DiscretizedNormal, LevelCategorical, Levels, bin_width, dequantize, quantize
from .reverse import (
    BinomialReverse,
    D3PMReverse,
    FixedLargeVariance,
    FixedVariance,
    ForwardVariance,
    GaussianReverse,
    PosteriorVariance,
    Variance,
)
from .samplers import AncestralSampler
from .schedules import (
    BetaSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    LogSNRSchedule,
    ReciprocalSchedule,
    Schedule,
    SubSchedule,
)
from .steps import (
    BoundWeighting,
    Drawing,
    ImportanceDrawing,
    LossSecondMoment,
    LowDiscrepancyDrawing,
    SimpleWeighting,
    UniformDrawing,
)
from .svi import SVI, exponential_average
from .verification import Claim, Verification, verify

__version__ = "0.1.0"

__all__ = [
    "AncestralSampler",
    "BetaSchedule",
    "BinomialForward",
    "BinomialReverse",
    "Bound",
    "BoundWeighting",
    "Claim",
    "CosineSchedule",
    "D3PMReverse",
    "DataPrediction",
    "Decoder",
    "Denoiser",
    "Diffusion",
    "DiffusionELBO",
    "DiscretizedDecoder",
    "DiscretizedNormal",
    "Drawing",
    "FixedLargeVariance",
    "FixedVariance",
    "FlowLikelihood",
    "Forward",
    "ForwardVariance",
    "GaussianDecoder",
    "GaussianForward",
    "GaussianReverse",
    "GeometricSchedule",
    "ImportanceBound",
    "ImportanceDrawing",
    "LevelCategorical",
    "LevelPrediction",
    "Levels",
    "Likelihood",
    "LinearSchedule",
    "LogSNRSchedule",
    "LogitPrediction",
    "LossSecondMoment",
    "LowDiscrepancyDrawing",
    "NoisePrediction",
    "OneStep",
    "PosteriorVariance",
    "ReciprocalSchedule",
    "SVI",
    "Schedule",
    "ScorePrediction",
    "SimpleWeighting",
    "SoftmaxDecoder",
    "SubSchedule",
    "TransitionDecoder",
    "UniformDrawing",
    "Variance",
    "VarianceAccount",
    "VelocityPrediction",
    "Verification",
    "bin_width",
    "bound",
    "checkpoints",
    "datasets",
    "dequantize",
    "exponential_average",
    "importance_bound",
    "networks",
    "ode_log_prob",
    "plots",
    "quantize",
    "variance_account",
    "verify",
]
