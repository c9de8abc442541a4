r"""Training on data with missing numbers: the bound on the observed numbers, with the missing ones as latents.

With :math:`x_0 = (x_o, x_m)`, o the observed and m the missing numbers of a datum, and a guide
:math:`q_\phi(x_m | x_o)` that is learned with the diffusion,

.. math::
    \log p(x_o) = \log \int p(x_o, x_m) \, dx_m \;\ge\;
        \mathbb{E}_{q_\phi(x_m | x_o)} \left[ \log p(x_o, x_m) - \log q_\phi(x_m | x_o) \right],

where log p(x_0) is in turn bounded by the diffusion, by one network call (:class:`OneStepEstimate`). The first gap is
the guide's, KL(q(x_m | x_o) || p(x_m | x_o)); if that is 0 and the data are Gaussian, the maximum is that of EM.
Training by the likelihood of the observed numbers is right if these are missing at random: it does not cover a number
that is missing *because* it is large.

References:
    MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets (Mattei & Frellsen, 2019), section 2: the
    bound on what is observed, https://arxiv.org/abs/1812.02633

    Maximum Likelihood from Incomplete Data via the EM Algorithm (Dempster, Laird & Rubin, 1977)
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..pair.diffusion import Diffusion
from ..pair.entropy import innermost
from ..process.forward import GaussianForward
from .distribution import DiffusionDistribution
from .estimates import FlowEstimate, OneStepEstimate

__all__ = ["GaussianImputer", "MissingData", "NetworkImputer"]


class MissingData(nn.Module):
    """A pair for data in which NaN marks missing numbers: ``svi = SVI(pair.model, pair.guide, ...)``.

    The model observes ``x_0``, completed by a latent site ``missing``, which the guide draws from an imputer. Its loss
    is a bound on -log p of the observed numbers, in nats; so is ``pair_bound(pair.model, pair.guide, x)``, per datum.

    Arguments:
        diffusion: The diffusion, of data with a density: a :class:`GaussianForward`, without levels.
        imputer: A module called as ``imputer(x, known, *context)``, with data that have 0 for missing numbers and a
            bool mask of the known ones, both with shape (B, *event_shape). It returns a distribution of whole data with
            batch_shape (B,): independent Normal numbers, or a MultivariateNormal of all D numbers flattened; only its
            marginal of the missing numbers is used. It must be differentiable. :class:`GaussianImputer` if not given.
        estimate: The estimate of log p(x_0), as of :class:`DiffusionDistribution`; a reference with moments close to
            those of the data removes most of its noise.
        plate: The name of the plate of the data.

    Raises:
        ValueError: If an argument is of another kind. On a call of the programs, while Pyro validates: if the data have
            another shape, are infinite, or no number of a datum is known; always, if the imputer returns another kind
            of distribution.

    References:
        MIWAE (Mattei & Frellsen, 2019), Eq. 4 at K = 1, https://arxiv.org/abs/1812.02633

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(num_steps=20))
        >>> denoiser = pyrodiff.VelocityPrediction(pyrodiff.networks.MLP(event_shape=(2,), hidden=16), forward)
        >>> diffusion = pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))
        >>> pair = pyrodiff.MissingData(diffusion)
        >>> optim = lambda parameters: torch.optim.Adam(parameters, lr=1e-3)
        >>> svi = pyrodiff.SVI(pair.model, pair.guide, optim, pyrodiff.DiffusionELBO())
        >>> x = torch.tensor([[1.0, 2.0], [0.5, float("nan")], [float("nan"), 1.0]])
        >>> bool(svi.step(x).isfinite())
        True
        >>> pyrodiff.pair_bound(pair.model, pair.guide, x).nats.shape
        torch.Size([3])
    """

    def __init__(
        self,
        diffusion: Diffusion,
        imputer: nn.Module | None = None,
        estimate: OneStepEstimate | FlowEstimate | None = None,
        *,
        plate: str = "data",
    ) -> None:
        super().__init__()
        checks.instance("diffusion", diffusion, Diffusion)
        if not isinstance(diffusion.forward_process, GaussianForward) or diffusion.levels is not None:
            raise ArgumentError(
                "diffusion",
                "must be one of data with a density, a GaussianForward without levels, for what is missing to be drawn "
                f"by a guide with a gradient, but its process is {diffusion.forward_process!r}, with "
                f"{diffusion.levels} levels: give it from_levels(k, levels, uniform=True)",
            )
        imputer = GaussianImputer(diffusion.event_shape).to(diffusion.model.dtype()) if imputer is None else imputer
        checks.instance("imputer", imputer, nn.Module)
        arguments.text("plate", plate)
        DiffusionDistribution(diffusion, estimate=estimate)  # raises if something does not fit
        self.model, self.guide = _Model(diffusion, estimate, plate), _Guide(diffusion, imputer, plate)

    @property
    def imputer(self) -> nn.Module:
        """The distribution of the missing numbers, given the known ones."""
        return self.guide.imputer

    def complete(self, x: Tensor, *context: Tensor) -> Tensor:
        """The data with missing numbers drawn by the imputer, which is an approximation of the diffusion's own
        posterior.

        Arguments:
            x: Data with shape (B, *event_shape), NaN where they are missing.
            *context: The context.

        Returns:
            A tensor of that shape.

        Raises:
            ValueError: As the programs.
        """
        _check(x, self.model.diffusion.event_shape)
        with torch.no_grad():
            return torch.where(x.isnan(), self.guide.law(x, context).rsample(), x)


class _Model(nn.Module):
    def __init__(self, diffusion: Diffusion, estimate: OneStepEstimate | FlowEstimate | None, plate: str) -> None:
        super().__init__()
        self.diffusion, self.estimate, self.plate = diffusion, estimate, plate

    def forward(self, x: Tensor, *context: Tensor) -> None:
        if checks.validating():
            _check(x, self.diffusion.event_shape)
        rows = [values.expand(len(x), *values.shape[1:]) for values in context]
        with pyro.plate(self.plate, len(x), dim=-1):
            drawn = pyro.sample("missing", _Flat(x))
            law = DiffusionDistribution(self.diffusion, *rows, estimate=self.estimate)
            pyro.sample("x_0", law, obs=torch.where(x.isnan(), drawn, x))


class _Guide(nn.Module):
    def __init__(self, diffusion: Diffusion, imputer: nn.Module, plate: str) -> None:
        super().__init__()
        self.imputer, self.event_shape, self.plate = imputer, diffusion.event_shape, plate

    def law(self, x: Tensor, context: Sequence[Tensor]) -> "_Guess":
        """q(x_m | x_o)."""
        known = ~x.isnan()
        rows = [values.expand(len(x), *values.shape[1:]) for values in context]
        law: Any = self.imputer(torch.where(known, x, 0.0), known, *rows)
        is_law, D = isinstance(law, torch.distributions.Distribution), self.event_shape.numel()
        is_joint = isinstance(law, torch.distributions.MultivariateNormal)
        is_normal = is_law and isinstance(innermost(law), torch.distributions.Normal)
        shapes = (law.batch_shape, law.event_shape) if is_joint or is_normal else None
        if shapes != (x.shape[:1], (D,) if is_joint else self.event_shape):
            raise ArgumentError(
                "imputer",
                f"must return Normal(...).to_event(...) with batch_shape ({len(x)},) and the event_shape "
                f"{tuple(self.event_shape)}, or MultivariateNormal of ({D},), but it is {arguments.described(law)}, of "
                f"the shapes {shapes}",
            )
        return _Guess(law, ~known)

    def forward(self, x: Tensor, *context: Tensor) -> None:
        if checks.validating():
            _check(x, self.event_shape)
        with pyro.plate(self.plate, len(x), dim=-1):
            pyro.sample("missing", self.law(x, context))


def _check(x: object, event_shape: torch.Size) -> None:
    """Refuse what cannot be data with something missing."""
    if not isinstance(x, Tensor) or x.shape[1:] != event_shape or x.dim() != 1 + len(event_shape) or len(x) == 0:
        expected = ", ".join(("B", *map(str, event_shape)))
        raise ArgumentError("x", f"must be a tensor with shape ({expected}), but it is {arguments.described(x)}")
    known = x.isfinite().flatten(1)
    if not checks.holds(known.any(1)):
        raise ArgumentError(
            "x",
            f"must have a known number in each datum, but in {int((~known.any(1)).sum())} of {len(x)} all are missing: "
            f"leave them out, since they say nothing",
        )
    if not checks.holds(~x.isinf()):
        raise ArgumentError("x", "must be finite, or NaN where it is missing, but some numbers are infinite")


class _Flat(dist.TorchDistribution):
    """An improper flat distribution of the missing numbers in the model: log density 0, as x_0 is scored as a whole."""

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.shape[:1], x.shape[1:], validate_args=False)
        self.x = x

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "_Flat":
        new = _Flat(self.x)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        raise ValueError("the pair of MissingData must be run with its guide, since its model draws no missing numbers")

    def log_prob(self, value: Tensor) -> Tensor:
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return value.new_zeros(torch.broadcast_shapes(lead, self.batch_shape))


class _Guess(dist.TorchDistribution):
    """The marginal of the missing numbers, of a distribution of whole data.

    Arguments:
        law: Independent Normal numbers, or a MultivariateNormal of all numbers flattened, with batch_shape (B,).
        missing: Which are missing, with shape (B, *event_shape).
    """

    arg_constraints: ClassVar[dict] = {}
    has_rsample = True

    def __init__(self, law: Any, missing: Tensor) -> None:
        super().__init__(law.batch_shape, missing.shape[1:], validate_args=False)
        self.law, self.missing = law, missing

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "_Guess":
        return _Guess(self.law.expand(torch.Size(batch_shape)), self.missing)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        x = self.law.rsample(torch.Size(sample_shape))
        x = x.reshape(*sample_shape, *self.batch_shape, *self.event_shape)
        return torch.where(self.missing, x, 0.0)

    def log_prob(self, value: Tensor) -> Tensor:
        event = len(self.event_shape)
        base: Any = innermost(self.law)
        if isinstance(base, torch.distributions.Normal):
            return torch.where(self.missing, base.log_prob(value), 0.0).flatten(-event).sum(-1)
        m = self.missing.flatten(1)
        off = torch.where(m, value.flatten(-event) - self.law.mean, 0.0)
        covariance = torch.where(m[..., None] & m[..., None, :], self.law.covariance_matrix, 0.0)
        covariance = covariance + torch.diag_embed((~m).to(off.dtype))  # known: N(0, 1) at 0, subtracted below
        of_all = dist.MultivariateNormal(torch.zeros_like(off), covariance, validate_args=False).log_prob(off)
        return of_all + (~m).sum(-1).to(off.dtype) * (0.5 * math.log(2 * math.pi))


class GaussianImputer(nn.Module):
    r"""Missing numbers given the known ones, under one learned Gaussian :math:`N(m, C)`: exact for Gaussian data.

    .. math:: x_m | x_o \sim N\left(m_m + C_{mo} C_{oo}^{-1} (x_o - m_o), \; C_{mm} - C_{mo} C_{oo}^{-1} C_{om}\right)

    It starts at N(0, I). Each datum takes a D x D factorisation, so D should be a few hundred at most. It ignores the
    context.

    Arguments:
        event_shape: The shape of one datum, of D numbers.

    Raises:
        ValueError: If it is no sequence of ints.

    Example:
        >>> imputer = pyrodiff.GaussianImputer((2,))
        >>> x, known = torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]])
        >>> imputer(x, known).mean
        tensor([[1., 0.]], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        D = checks.event_shape(event_shape).numel()
        self.mean, self.factor = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D, D))

    def forward(self, x: Tensor, known: Tensor, *context: Tensor) -> dist.MultivariateNormal:
        x, known = x.flatten(1), known.flatten(1)
        L = self.factor.tril(-1) + self.factor.diagonal().exp().diag()
        C, eye = L @ L.T, torch.eye(len(L), dtype=L.dtype, device=L.device)
        both = known[:, :, None] & known[:, None, :]
        factor = torch.linalg.cholesky(torch.where(both, C, eye))
        to_known = torch.where(known[:, None, :], C, 0.0)  # C_{.o}, 0 elsewhere
        gain = torch.cholesky_solve(to_known.mT, factor).mT
        mean = self.mean + (gain @ torch.where(known, x - self.mean, 0.0)[..., None])[..., 0]
        neither = ~known[:, :, None] & ~known[:, None, :]
        covariance = torch.where(neither, C - gain @ to_known.mT, eye)
        return dist.MultivariateNormal(torch.where(known, x, mean), covariance, validate_args=False)


class NetworkImputer(nn.Module):
    """Missing numbers given the known ones, as independent Normal numbers, by a network.

    Dependencies between missing numbers are ignored, which makes the bound looser.

    Arguments:
        network: Called as ``network(x, known, *context)``, as an imputer is, with ``known`` as numbers 0 and 1; it
            returns means and log deviations, in a last dimension of two.

    Raises:
        ValueError: If it is no module; on a call, if it returns another shape.

    Example:
        >>> class Network(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(6, 6)
        ...     def forward(self, x, known):
        ...         return self.linear(torch.cat([x, known], 1)).view(-1, 3, 2)
        >>> imputer = pyrodiff.NetworkImputer(Network())
        >>> imputer(torch.zeros(5, 3), torch.ones(5, 3, dtype=torch.bool)).event_shape
        torch.Size([3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        checks.instance("network", network, nn.Module)
        self.network = network

    def forward(self, x: Tensor, known: Tensor, *context: Tensor) -> dist.TorchDistribution:
        found = self.network(x, known.to(x.dtype), *context)
        checks.returned("network", found, (*x.shape, 2), x)
        return dist.Normal(found[..., 0], found[..., 1].exp(), validate_args=False).to_event(x.dim() - 1)
