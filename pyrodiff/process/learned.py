r"""Noise schedules that are learned with the rest, by the bound.

The guide :math:`q(x_{1:T} | x_0)` of a Gaussian diffusion is reparameterised, so the bound has a gradient in
:math:`\beta_1, \dots, \beta_T` as in any other parameter: a learned schedule stands in the place of a fixed one, in
either pair, and :class:`SVI` finds its parameters. Sohl-Dickstein et al. call it *frozen noise*: :math:`\epsilon` is an
auxiliary variable, held constant while the derivative is taken. With one seed set before each step it is constant
throughout training.

Both schedules here preserve variance and are written by their log signal-to-noise ratio :math:`\lambda_t`,

.. math:: a_t^2 = \mathrm{sigmoid}(\lambda_t), \qquad b_t^2 = \mathrm{sigmoid}(-\lambda_t),

which decreases in t for any values of their parameters. Parameters are float64 and stay so in a model of another dtype.

The bits of a :class:`BinomialForward` are not reparameterised: there no schedule can be learned by a gradient of this
kind. A learned schedule is used with bits as it is after ``schedule.requires_grad_(False)``.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.4.1,
    https://arxiv.org/abs/1503.03585

    Variational Diffusion Models (Kingma et al., 2021), section 3.2, appendices H and I, https://arxiv.org/abs/2107.00630

    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 111-114, https://arxiv.org/abs/2208.11970
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import default_home, home
from .schedules import Schedule

__all__ = ["LearnedBetaSchedule", "LearnedLogSNRSchedule"]


class _Learned(Schedule):
    """A VP schedule that is a differentiable function of t, with float64 parameters."""

    @abstractmethod
    def _falling(self, t: Tensor) -> Tensor:
        """The log SNR at times in 1..T, of any shape."""

    def log_snr(self, t: int | Tensor) -> Tensor:
        t = self._times(t)
        return torch.where(t == 0, math.inf, self._falling(t.clamp(min=1)))

    def signal(self, t: int | Tensor) -> Tensor:
        return self.scales(t)[0]

    def noise(self, t: int | Tensor) -> Tensor:
        return self.scales(t)[1]

    def scales(self, t: int | Tensor) -> Tensor:
        return torch.stack(_scales(self.log_snr(t)))

    def beta(self, t: int | Tensor) -> Tensor:
        t = self._times(t)
        now, before = self._both(t.clamp(min=1), t.clamp(min=1) - 1)
        return torch.where(t == 0, 0.0, torch.sigmoid(-now) * _lost(now, before))

    def step(self, t: int | Tensor, s: int | Tensor) -> tuple[Tensor, Tensor]:
        now, before = self._both(t, s)
        (signal_t, noise_t), (signal_s, _) = _scales(now), _scales(before)
        return signal_t / signal_s, noise_t * _lost(now, before).sqrt()

    def posterior(self, t: int | Tensor, s: int | Tensor | None = None) -> Tensor:
        now, before = self._both(t, self._before(t) if s is None else s)
        (signal_t, noise_t), (signal_s, noise_s), lost = _scales(now), _scales(before), _lost(now, before)
        return torch.stack([signal_t / signal_s * (noise_s / noise_t) ** 2, signal_s * lost, noise_s * lost.sqrt()])

    def _both(self, t: int | Tensor, s: int | Tensor) -> tuple[Tensor, Tensor]:
        """The log SNR at t and at s, in one evaluation."""
        checks.time("s", s, self.num_steps)
        now, before = self.log_snr(torch.stack(torch.broadcast_tensors(self._times(t), self._times(s))))
        return now, before

    def _times(self, t: int | Tensor) -> Tensor:
        """The times as an integer tensor of their shape, where the parameters are."""
        if checks.validating() or not isinstance(t, Tensor):
            checks.time("t", t, self.num_steps)
        device = self.device
        if not isinstance(t, Tensor):
            return torch.full((), int(t), device=device)
        if checks.validating() and t.device != device and home(t.device) != device:
            raise ArgumentError("t", f"must be on the schedule's device {device}, but it is on {t.device}")
        return t.to(device, torch.long)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Learned":
        """Parameters and their gradients, as buffers, follow the module to a device and keep their dtype."""

        def moved(x: Tensor) -> Tensor:
            device = home(fn(torch.empty(0, device=x.device)).device)
            return torch.empty_like(x, device=device) if x.is_meta and device.type != "meta" else x.to(device)

        super()._apply(moved, recurse)
        return self


def _scales(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise; their gradient is finite also where the log SNR is infinite."""
    return (logsigmoid(log_snr) / 2).exp(), (logsigmoid(-log_snr) / 2).exp()


def _lost(now: Tensor, before: Tensor) -> Tensor:
    """The fraction of the signal-to-noise ratio that is lost between two times."""
    return -torch.expm1(now - before)


class LearnedBetaSchedule(_Learned):
    r"""The VP schedule of learned :math:`\beta_1, \dots, \beta_T`, of which the first ``fixed`` are not learned.

    The parameters are :math:`\mathrm{logit} \, \beta_t`, float64, T - ``fixed`` of them, under the name ``logits``.
    Sohl-Dickstein et al. learn the schedule of their Gaussian diffusions so, with :math:`\beta_1` fixed to a small
    constant, against overfitting. For a prior on the betas, ``del schedule.logits`` and let a program set
    ``schedule.logits``, to a draw of ``pyro.sample`` say: model and guide both use it.

    Arguments:
        betas: The :math:`\beta_t` at the start, T numbers in (0, 1).
        fixed: How many of the first are not learned, an int in 0..T-1.

    Raises:
        ValueError: If ``betas`` is empty, not one-dimensional, has a value outside (0, 1) or requires a gradient, or
            ``fixed`` is not an int in 0..T-1.

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 2.4.1,
        https://arxiv.org/abs/1503.03585

    Example:
        >>> schedule = pyrodiff.LearnedBetaSchedule([0.1, 0.2, 0.5])
        >>> forward = pyrodiff.GaussianForward(schedule)
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> optim = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)
        >>> svi = pyrodiff.SVI(diffusion.model, diffusion.guide, optim, pyrodiff.DiffusionELBO())
        >>> for step in range(3):
        ...     loss = svi.step(torch.randn(50, 2))
        >>> schedule.beta(1).item(), schedule.beta(2).item() == 0.2
        (0.1, False)

        Noise frozen from step to step by one seed (which freezes the times too, in the one-step pair):

        >>> for step in range(3):
        ...     pyro.set_rng_seed(0)
        ...     loss = svi.step(torch.ones(50, 2))
    """

    first_betas: Tensor

    def __init__(self, betas: Sequence[float] | Tensor, fixed: int = 1) -> None:
        betas = checks.numbers("betas", betas)
        if betas.dim() != 1 or len(betas) == 0:
            raise ArgumentError(
                "betas", f"must be a sequence of at least one number, but its shape is {tuple(betas.shape)}"
            )
        allowed = (betas > 0) & (betas < 1)
        if not checks.holds(allowed):
            index = int((~allowed).nonzero()[0])
            raise ArgumentError(
                "betas",
                f"must lie in (0, 1) to be learned, but betas[{index}] of {len(betas)} is {float(betas[index])}: "
                f"BetaSchedule takes a last beta of 1, which erases all, as it is",
            )
        T = len(betas)
        if not (arguments.is_int(fixed) and 0 <= fixed < T):
            raise ArgumentError(
                "fixed",
                f"must be an int in 0..T-1 = {T - 1}, so that there is a beta to learn, but it is "
                f"{arguments.described(fixed)}: give BetaSchedule(betas) if all are fixed",
            )
        super().__init__(T)
        self.register_buffer("first_betas", betas[: int(fixed)].clone())
        self.logits = nn.Parameter(torch.logit(betas[int(fixed) :]))

    @property
    def device(self) -> torch.device:
        return self.first_betas.device

    @property
    def betas(self) -> Tensor:
        r"""The :math:`\beta_1, \dots, \beta_T`, with shape (T,); they can be differentiated."""
        return torch.cat([self.first_betas, self.logits.sigmoid()])

    def beta(self, t: int | Tensor) -> Tensor:
        t = self._times(t)
        return torch.where(t == 0, 0.0, _columns(self.betas, t.clamp(min=1)))

    def _falling(self, t: Tensor) -> Tensor:
        log_kept = torch.cat([torch.log1p(-self.first_betas), logsigmoid(-self.logits)])  # log(1 - beta)
        log_alpha_bar = log_kept.cumsum(0)
        return _columns(log_alpha_bar - (-torch.expm1(log_alpha_bar)).log(), t)

    def extra_repr(self) -> str:
        if self.logits.is_meta:
            return f"num_steps={self.num_steps}, fixed={len(self.first_betas)}"
        first, last = self.betas.detach()[[0, -1]].tolist()
        return f"num_steps={self.num_steps}, beta={first:.4g}..{last:.4g}, fixed={len(self.first_betas)}"


def _columns(values: Tensor, t: Tensor) -> Tensor:
    """The values at times t, of any shape, out of those for t = 1..T."""
    return values.index_select(0, (t - 1).flatten()).reshape(t.shape)


class LearnedLogSNRSchedule(_Learned):
    r"""The VP schedule whose :math:`\lambda_t` is a monotone network between two ends.

    .. math::
        \lambda_t &= \lambda_1 + \frac{g(u_t)}{g(1)} (\lambda_T - \lambda_1), \qquad u_t = \frac{t - 1}{T - 1} \\
        g(u) &= w u + \frac1H \sum_{k=1}^H v_k \left(\mathrm{sigmoid}(s_k u + c_k) - \mathrm{sigmoid}(c_k)\right)

    with w, v and s positive (the softplus of their parameters): three layers, the middle one of H sigmoids. It is
    :math:`\gamma = -\lambda` of variational diffusion models, evaluated at t = 1..T, and Luo's :math:`\omega`. At the
    start it is nearly linear, as in :class:`LogSNRSchedule`.

    With few steps, the schedule between the ends makes the bound tighter. In continuous time, the limit of large T, the
    bound depends on the ends alone, and the schedule between them changes only the variance of its estimate
    (:meth:`steadied`). The network is evaluated at the times that are asked for, or at all T where these are fewer, so
    with T = 1000000 a training step evaluates it at no more times than its batch has data. There the fall of
    :math:`\lambda` in a step is still exact to nine digits; but where :math:`\lambda_1` is above 9, the means of two
    kernels differ by less than float32 resolves: use ``diffusion.double()``. And the variance of the first step must
    not shrink with the others, as it does with :class:`PosteriorVariance`: with :class:`ForwardVariance` it is
    :math:`\beta_1`.

    The ends are learned by the bound too: :math:`L_T` is large if there is too much signal left at T, :math:`L_0` and
    the first steps if there is too little or too much noise at t = 1. On few data, or on quantised ones scored as a
    density, :math:`\lambda_1` grows without end: fix it by ``learn_ends=False``. Then both ends stay exactly as given,
    while those of the paper's code drift (google-research/vdm#11).

    Arguments:
        num_steps: The number of steps :math:`T`, at least 1. With T = 1 only ``first`` is used.
        first: :math:`\lambda_1`, its initial value, or its fixed one.
        last: :math:`\lambda_T`, below ``first``. The two cannot cross while they are learned.
        hidden: The number H of sigmoids.
        learn_ends: Whether the two ends are learned; else they are fixed.

    Raises:
        ValueError: If a number is not a positive int, an end lies outside (-700, 700), where float64 ends, ``last`` is
            not below ``first``, or ``learn_ends`` is not a bool.

    References:
        Variational Diffusion Models (Kingma et al., 2021), appendix H, with H = 1024, https://arxiv.org/abs/2107.00630

        Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 111-114.

    Example:
        >>> schedule = pyrodiff.LearnedLogSNRSchedule(num_steps=1000000, first=9.0, last=-9.0, learn_ends=False)
        >>> schedule.log_snr(torch.tensor([0, 1, 1000000])).detach()
        tensor([inf, 9., -9.], dtype=torch.float64)
    """

    first: Tensor
    _last: Tensor

    def __init__(self, num_steps: int, first: float, last: float, hidden: int = 1024, learn_ends: bool = True) -> None:
        super().__init__(num_steps)
        first = arguments.number("first", first, -700, 700)
        if not (arguments.is_number(last) and -700 < last < first):
            raise ArgumentError(
                "last",
                f"must be a number in (-700, {first}), below first since the signal-to-noise ratio falls, but it "
                f"is {arguments.described(last)}",
            )
        hidden = arguments.positive_int("hidden", hidden)
        arguments.one_of("learn_ends", learn_ends, (False, True))
        numbers: dict[str, Any] = {"dtype": torch.float64, "device": default_home()}
        if learn_ends:
            self.first = nn.Parameter(torch.tensor(first, **numbers))
            self.log_fall = nn.Parameter(torch.tensor(math.log(first - last), **numbers))
        else:
            self.register_buffer("first", torch.tensor(first, **numbers))
            self.register_buffer("_last", torch.tensor(float(last), **numbers))
        centres = -0.25 + 1.5 * (torch.arange(hidden, **numbers) + 0.5) / hidden  # beyond 0..1, for a line at the start
        slopes = 5 + 10 * torch.rand(hidden, **numbers)
        self.line = nn.Parameter(torch.tensor(_before_softplus(1.0), **numbers))
        self.slopes = nn.Parameter(slopes.expm1().log())
        self.offsets = nn.Parameter(-slopes * centres)
        self.weights = nn.Parameter(torch.full((hidden,), _before_softplus(1.0), **numbers))

    @property
    def device(self) -> torch.device:
        return self.first.device

    @property
    def last(self) -> Tensor:
        r""":math:`\lambda_T`, with shape (); it can be differentiated where it is learned."""
        return self._last if "_last" in self._buffers else self.first - self.log_fall.exp()

    def steadied(self, costs: Tensor) -> Tensor:
        r"""The sum of costs, whose gradient in the schedule between its ends is that of the sum of their squares.

        In continuous time the mean of the estimate does not depend on the schedule between its ends, so to minimise the
        mean of its square is to minimise its variance. The ends, where learned, and all other parameters have the
        gradient of the bound. Use it in an ELBO of your own, on the one-step pair:

        .. code-block:: python

            class Steady(pyrodiff.DiffusionELBO):
                def differentiable_loss(self, model, guide, *args, **kwargs):
                    terms = self.terms(model, guide, *args, **kwargs)
                    schedule = model.forward_process.schedule
                    return terms["x_T"].sum() + terms["x_0"].sum() + schedule.steadied(terms["x_s"])

        Arguments:
            costs: The estimates per datum, with shape (B,).

        Returns:
            Their sum, with shape ().

        References:
            Variational Diffusion Models (Kingma et al., 2021), appendix I.2, https://arxiv.org/abs/2107.00630
        """
        total = costs.sum()
        between = [p for p in (self.line, self.slopes, self.offsets, self.weights) if p.requires_grad]
        if not (between and total.requires_grad):
            return total
        squares, plain = (torch.autograd.grad(x, between, retain_graph=True) for x in ((costs**2).sum(), total))
        changes = [((a - b) * p).sum() for a, b, p in zip(squares, plain, between, strict=True)]
        change = sum(changes[1:], changes[0]).to(total.dtype)
        return total + change - change.detach()  # the value of total; in each p between, the gradient of the squares

    def _falling(self, t: Tensor) -> Tensor:
        T = self.num_steps
        if t.numel() > T:  # more times than there are: each is evaluated once
            return _columns(self._falling(torch.arange(1, T + 1, device=t.device)), t)
        u = (t - 1).double() / max(T - 1, 1)
        part = self._rise(u) / self._rise(u.new_ones(()))
        part = torch.where(t == 1, 0.0, torch.where(t == T, 1.0, part))  # exactly, whatever the order of a sum
        return torch.lerp(self.first, self.last, part)

    def _rise(self, u: Tensor) -> Tensor:
        """g(u), for u of any shape."""
        slopes, weights = softplus(self.slopes), softplus(self.weights)
        units = torch.sigmoid(slopes * u[..., None] + self.offsets) - torch.sigmoid(self.offsets)
        return softplus(self.line) * u + (weights * units).mean(-1)

    def extra_repr(self) -> str:
        shown = f"num_steps={self.num_steps}"
        if not self.line.is_meta:
            shown += f", first={float(self.first.detach()):.4g}, last={float(self.last.detach()):.4g}"
        return f"{shown}, hidden={len(self.slopes)}, learn_ends={'_last' not in self._buffers}"


def _before_softplus(value: float) -> float:
    return math.log(math.expm1(value))
