"""What the package offers: its public names, each from the module that it lives in."""

from . import checkpoints, datasets, networks, plots, scores, streaming
from .base.arguments import ArgumentError
from .inference.approximations import perturbed, replacement
from .inference.distribution import DiffusionDistribution
from .inference.estimates import FlowEstimate, OneStepEstimate
from .inference.missing import GaussianImputer, MissingData, NetworkImputer
from .inference.observations import Conditioned, Inpainting, Linear
from .inference.posterior import Posterior, posterior
from .inference.products import Product, product
from .inference.twists import DenoiserTwist, GaussianTwist, IsotropicTwist, KnownTwist, RepeatedTwist, Twist
from .likelihood.accounting import VarianceAccount, variance_account
from .likelihood.bounds import Bound, ImportanceBound, bound, importance_bound
from .likelihood.estimate import Likelihood
from .likelihood.flows import FlowLikelihood, ode_log_prob
from .likelihood.pairs import PairBound, pair_bound, pair_importance_bound
from .likelihood.psis import pareto_k
from .likelihood.shortening import analytic_variance, best_subchain
from .likelihood.verification import Claim, Verification, verify
from .likelihood.yardsticks import Yardstick, Yardsticks, yardsticks
from .model.clipping import Clipped, Thresholded
from .model.decoders import Decoder, DiscretizedDecoder, GaussianDecoder, SoftmaxDecoder, TransitionDecoder
from .model.denoisers import (
    DataPrediction,
    Denoiser,
    LevelPrediction,
    LogitPrediction,
    NoisePrediction,
    ScorePrediction,
    VelocityPrediction,
)
from .model.reverse import BinomialReverse, D3PMReverse, GaussianReverse
from .model.variances import (
    AnalyticVariance,
    DiagonalVariance,
    FixedLargeVariance,
    FixedVariance,
    ForwardVariance,
    LearnedVariance,
    PosteriorVariance,
    RangeVariance,
    Variance,
)
from .pair.diffusion import Diffusion, OneStep, adopt_stored
from .pair.elbo import DiffusionELBO
from .pair.times import (
    BoundWeighting,
    Drawing,
    HybridWeighting,
    ImportanceDrawing,
    LossSecondMoment,
    LowDiscrepancyDrawing,
    NoiseWeighting,
    ScoreWeighting,
    SimpleWeighting,
    UniformDrawing,
)
from .process.forward import BinomialForward, Forward, GaussianForward
from .process.learned import LearnedBetaSchedule, LearnedLogSNRSchedule
from .process.noise_levels import initial_noise, langevin_step_size, noise_ratio
from .process.quantization import DiscretizedNormal, LevelCategorical, Levels, bin_width, from_levels, to_levels
from .process.schedules import (
    BetaSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    LogSNRSchedule,
    ReciprocalSchedule,
    Schedule,
    SubSchedule,
)
from .running.threads import fastest_threads
from .sampling.ancestral import AncestralSampler
from .sampling.flow import FlowSampler
from .sampling.langevin import AnnealedLangevinSampler, LangevinSampler
from .sampling.sampler import Sampler
from .sampling.solvers import DDIMSampler, DPMSolverSampler, HeunSampler, PredictorCorrectorSampler
from .training.svi import SVI, exponential_average

__all__ = [
    "AnalyticVariance",
    "AncestralSampler",
    "AnnealedLangevinSampler",
    "ArgumentError",
    "BetaSchedule",
    "BinomialForward",
    "BinomialReverse",
    "Bound",
    "BoundWeighting",
    "Claim",
    "Clipped",
    "Conditioned",
    "CosineSchedule",
    "D3PMReverse",
    "DDIMSampler",
    "DPMSolverSampler",
    "DataPrediction",
    "Decoder",
    "Denoiser",
    "DenoiserTwist",
    "DiagonalVariance",
    "Diffusion",
    "DiffusionDistribution",
    "DiffusionELBO",
    "DiscretizedDecoder",
    "DiscretizedNormal",
    "Drawing",
    "FixedLargeVariance",
    "FixedVariance",
    "FlowEstimate",
    "FlowLikelihood",
    "FlowSampler",
    "Forward",
    "ForwardVariance",
    "GaussianDecoder",
    "GaussianForward",
    "GaussianImputer",
    "GaussianReverse",
    "GaussianTwist",
    "GeometricSchedule",
    "HeunSampler",
    "HybridWeighting",
    "ImportanceBound",
    "ImportanceDrawing",
    "Inpainting",
    "IsotropicTwist",
    "KnownTwist",
    "LangevinSampler",
    "LearnedBetaSchedule",
    "LearnedLogSNRSchedule",
    "LearnedVariance",
    "LevelCategorical",
    "LevelPrediction",
    "Levels",
    "Likelihood",
    "Linear",
    "LinearSchedule",
    "LogSNRSchedule",
    "LogitPrediction",
    "LossSecondMoment",
    "LowDiscrepancyDrawing",
    "MissingData",
    "NetworkImputer",
    "NoisePrediction",
    "NoiseWeighting",
    "OneStep",
    "OneStepEstimate",
    "PairBound",
    "Posterior",
    "PosteriorVariance",
    "PredictorCorrectorSampler",
    "Product",
    "RangeVariance",
    "ReciprocalSchedule",
    "RepeatedTwist",
    "SVI",
    "Sampler",
    "Schedule",
    "ScorePrediction",
    "ScoreWeighting",
    "SimpleWeighting",
    "SoftmaxDecoder",
    "SubSchedule",
    "Thresholded",
    "TransitionDecoder",
    "Twist",
    "UniformDrawing",
    "Variance",
    "VarianceAccount",
    "VelocityPrediction",
    "Verification",
    "Yardstick",
    "Yardsticks",
    "adopt_stored",
    "analytic_variance",
    "best_subchain",
    "bin_width",
    "bound",
    "checkpoints",
    "datasets",
    "exponential_average",
    "fastest_threads",
    "from_levels",
    "importance_bound",
    "initial_noise",
    "langevin_step_size",
    "networks",
    "noise_ratio",
    "ode_log_prob",
    "pair_bound",
    "pair_importance_bound",
    "pareto_k",
    "perturbed",
    "plots",
    "posterior",
    "product",
    "replacement",
    "scores",
    "streaming",
    "to_levels",
    "variance_account",
    "verify",
    "yardsticks",
]
