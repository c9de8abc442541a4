r"""The pair: a diffusion model is two Pyro programs.

The *model* is the generative chain and the *guide* the fixed forward posterior, in the model's order,

.. math::
    p_\theta(x_{0:T}) &= p(x_T) \prod_{t=2}^{T} p_\theta(x_{t-1} | x_t) \; p_\theta(x_0 | x_1) \\
    q(x_{1:T} | x_0) &= q(x_T | x_0) \prod_{t=2}^{T} q(x_{t-1} | x_t, x_0),

so that Pyro's ``TraceMeanField_ELBO``, which takes the analytic KL at each site, is
:math:`L_T + \sum_{t=2}^T L_{t-1} + L_0` (Luo 2022, Eq. 58):

.. math::
    L_T = KL(q(x_T | x_0) \| p(x_T)), \quad
    L_{t-1} = \mathbb{E}_q KL(q(x_{t-1} | x_t, x_0) \| p_\theta(x_{t-1} | x_t)), \quad
    L_0 = -\mathbb{E}_q \log p_\theta(x_0 | x_1).

A guide that ran forward, :math:`q(x_t | x_{t-1})`, is another matter: given :math:`x_{t-1}` and :math:`x_{t+1}`,
:math:`x_t` does not follow :math:`q(x_t | x_{t-1})`, so the KLs at its sites are not the terms of any bound.
:class:`DiffusionELBO` then takes log ratios.

The *trajectory pair* has one site per step, ``x_T .. x_1`` and ``x_0``. The *one-step pair* draws one t per datum, then
:math:`x_t \sim q(x_t | x_0)`, and scores only that step, scaled by 1 / p(t): the same bound in the mean at the price
of one network call, whatever T.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 34-58, https://arxiv.org/abs/2208.11970
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.nn import PyroModule
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

from . import checks
from .decoders import Decoder, GaussianDecoder
from .forward import Forward
from .precision import home
from .steps import BoundWeighting, Drawing, LowDiscrepancyDrawing

__all__ = ["Diffusion", "OneStep"]


class Diffusion(nn.Module):
    r"""A diffusion model, as a pair of Pyro programs.

    ``diffusion.model(x_0)`` and ``diffusion.guide(x_0)`` are the trajectory pair, for any of Pyro's inference
    algorithms; ``diffusion.model(num_samples=n)`` generates; :meth:`one_step` is the one-step pair. Both come from the
    same ``forward``, ``reverse`` and ``decoder``, so a variant that changes a kernel gets everything else for free.

    Arguments:
        forward: The forward process q.
        reverse: The reverse process: a module called as ``reverse(x_t, t)``, which returns the distribution
            :math:`p_\theta(x_{t-1} | x_t)` with batch_shape (B,) and the given event_shape.
        event_shape: The shape of one datum.
        decoder: A module called as ``decoder(kernel, x_1)``, which returns :math:`p_\theta(x_0 | x_1)`; the kernel
            itself (:class:`GaussianDecoder`) if not given.
        prior: p(x_T): a distribution with the given event_shape, or a module that returns one when called;
            ``forward.prior(event_shape)`` if not given.

    Raises:
        ValueError: If an argument is of another kind or made for another forward process, the prior has another
            event_shape, or denoiser and decoder are of another number of levels. On a call of the programs,
            before any draw: if ``x_0`` has another shape than (B, *event_shape), another dtype or device than the
            model, or a value outside the support of ``forward``; also if the reverse process, the decoder or the prior
            returns no distribution, or one of another event_shape.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=10))
        >>> network = pyrodiff.networks.MLP(event_shape=(2,))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.NoisePrediction(network, forward))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> diffusion.model(num_samples=5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        forward: Forward,
        reverse: nn.Module,
        event_shape: Sequence[int],
        decoder: nn.Module | None = None,
        prior: dist.Distribution | nn.Module | None = None,
    ) -> None:
        super().__init__()
        decoder = GaussianDecoder() if decoder is None else decoder
        checks.instance("forward", forward, Forward)
        checks.instance("reverse", reverse, nn.Module)
        checks.instance("decoder", decoder, nn.Module)
        checks.same_process("reverse", reverse, forward)
        checks.same_process("decoder", decoder, forward)
        _check_levels(reverse, decoder)
        event_shape = checks.event_shape(event_shape)
        if not isinstance(prior, nn.Module | None):
            _check_law(prior, "prior", event_shape)
        self.model = TrajectoryModel(forward, reverse, event_shape, decoder, prior)
        self.guide = TrajectoryGuide(forward, event_shape)

    @property
    def forward_process(self) -> Forward:
        """The forward process q."""
        return self.model.forward_process

    @property
    def reverse(self) -> nn.Module:
        """The reverse process."""
        return self.model.reverse

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one datum."""
        return self.model.event_shape

    @property
    def num_steps(self) -> int:
        """The number of steps T."""
        return self.model.num_steps

    @property
    def levels(self) -> int | None:
        """How many values a number of the data may take, where the decoder gives each a probability; else None."""
        bits = self.forward_process.support is constraints.boolean
        return 2 if bits else getattr(self.model.decoder, "levels", None)

    def one_step(
        self, drawing: Drawing | None = None, weighting: Callable[[Tensor], Tensor] | None = None
    ) -> "OneStep":
        """The one-step pair: one network call of the batch, whatever T, and the same bound in the mean.

        Arguments:
            drawing: How t is drawn: :class:`LowDiscrepancyDrawing` if not given, which mostly varies less than uniform
                draws.
            weighting: What the step weighs: called with integers of shape (B,), it returns positive numbers of that
                shape; the bound's weighting, 1, if not given.

        Returns:
            The pair, with ``model`` and ``guide``.

        Raises:
            ValueError: If an argument is of another kind; on a call of the programs, if the weighting returns
                another shape.

        Example:
            >>> forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=1000))
            >>> denoiser = pyrodiff.LogitPrediction(pyrodiff.networks.MLP(event_shape=(20,)), forward)
            >>> reverse = pyrodiff.BinomialReverse(forward, denoiser)
            >>> pair = pyrodiff.Diffusion(forward, reverse, event_shape=(20,)).one_step()
            >>> elbo = pyrodiff.DiffusionELBO()
            >>> sorted(elbo.terms(pair.model, pair.guide, torch.ones(5, 20)))
            ['x_0', 'x_T', 'x_s']
        """
        drawing = LowDiscrepancyDrawing() if drawing is None else drawing
        return OneStep(self, drawing, BoundWeighting() if weighting is None else weighting)

    def subchain(self, times: Sequence[int]) -> "Diffusion":
        r"""The diffusion of fewer steps, :math:`p_\theta(x_0, x_{\tau_1}, \dots, x_{\tau_K})`, with the same networks.

        It is a model of its own: its bound, its samples and its pairs are those of the shorter chain, exactly, by the
        general posterior :math:`q(x_s | x_t, x_0)`. Fewer steps cost less and bound less tightly.

        Arguments:
            times: The times :math:`\tau_1 < \dots < \tau_K`, ints in 1..T.

        Returns:
            A diffusion of K steps, which shares its parameters with this one.

        Raises:
            ValueError: If ``times`` are not increasing ints in 1..T; if the forward or the reverse process has no
                ``subchain`` method; if the prior was given, and ``times`` do not end at T.

        References:
            Denoising Diffusion Implicit Models (Song et al., 2021), section 4.2, https://arxiv.org/abs/2010.02502

        Example:
            >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=100))
            >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,)))
            >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
            >>> pyrodiff.bound(diffusion.subchain(range(10, 101, 10)), torch.ones(5, 2)).denoising.shape
            torch.Size([9, 5])
        """
        forward, model = self.forward_process.subchain(times), self.model
        if model.prior is not None and int(max(times)) != self.num_steps:
            raise ValueError(f"times must end at T = {self.num_steps}, the time of the given prior, but are {times!r}")
        parts = {"reverse": model.reverse, "decoder": model.decoder}
        for name, part in parts.items():
            if not hasattr(part, "subchain"):
                raise ValueError(
                    f"{name} must have a method subchain(forward), which returns it for a forward process of fewer "
                    f"steps, but it is a {type(part).__name__}, which has none"
                )
            parts[name] = part.subchain(forward)
        return Diffusion(forward, event_shape=self.event_shape, prior=model.prior, **parts)


class OneStep(nn.Module):
    """The one-step pair of a diffusion: see :meth:`Diffusion.one_step`.

    Both programs draw the auxiliary sites ``u``, which says t, and ``x_t``; they stand under ``mask(False)`` in both,
    so that they cost nothing. What is scored is ``x_T`` (L_T, in closed form), and, scaled by w(t) / p(t), the site
    ``x_s``, s = t - 1, where t > 1, or ``x_0`` where t = 1.
    """

    def __init__(self, diffusion: Diffusion, drawing: Drawing, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        checks.instance("drawing", drawing, Drawing)
        if not callable(weighting):
            raise ValueError(f"weighting must be called with t, but it is {weighting!r}")
        drawing.to(diffusion.forward_process.schedule.device)
        step = _Step(diffusion.forward_process, diffusion.event_shape, drawing, weighting)
        self.model, self.guide = OneStepModel(diffusion.model, step), OneStepGuide(step)


def _check_levels(reverse: nn.Module, decoder: nn.Module) -> None:
    ours, theirs = (getattr(part, "levels", None) for part in (getattr(reverse, "denoiser", None), decoder))
    if ours is not None and theirs is not None and ours != theirs:
        raise ValueError(f"decoder must have the {ours} levels that the denoiser predicts, but it has {theirs}")


def _check_law(law: dist.Distribution, name: str, event_shape: torch.Size) -> dist.Distribution:
    if not isinstance(law, torch.distributions.Distribution):
        raise ValueError(f"{name} must be a distribution or return one, but it is {law!r}")
    if law.event_shape != event_shape:
        raise ValueError(
            f"{name} must have the event_shape {tuple(event_shape)}, but its event_shape is {tuple(law.event_shape)} "
            f"(and its batch_shape {tuple(law.batch_shape)})"
        )
    return law


def _time(x: Tensor, t: int, event_shape: torch.Size) -> int | Tensor:
    """The time t of all data, as a tensor where the batch has more dimensions than one (vectorised particles)."""
    batch_shape = x.shape[: x.dim() - len(event_shape)]
    return t if len(batch_shape) == 1 else torch.full(batch_shape, t, device=x.device)


class TrajectoryGuide(nn.Module):
    """The guide q(x_1:T | x_0): sites ``x_T .. x_1`` in the model's order, in the plate "data".

    Called as ``guide(x_0)``, with data of shape (B, *event_shape).
    """

    def __init__(self, forward: Forward, event_shape: torch.Size) -> None:
        super().__init__()
        self.forward_process, self.event_shape = forward, event_shape

    def forward(self, x_0: Tensor) -> None:
        q, T = self.forward_process, self.forward_process.num_steps
        if checks.validating():
            q.check(x_0, self.event_shape)
        with pyro.plate("data", len(x_0), dim=-1):
            x = pyro.sample(f"x_{T}", q.marginal(x_0, T))
            for t in range(T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", q.posterior(x, x_0, _time(x, t, self.event_shape)))


class Generative(nn.Module):
    """The parts of p_θ(x_0:T), whose laws are checked while Pyro validates."""

    def __init__(
        self,
        forward: Forward,
        reverse: nn.Module,
        event_shape: torch.Size,
        decoder: nn.Module,
        prior: dist.Distribution | nn.Module | None,
    ) -> None:
        super().__init__()
        self.forward_process, self.reverse, self.event_shape = forward, reverse, event_shape
        self.decoder, self.prior = decoder, prior

    @property
    def num_steps(self) -> int:
        return self.forward_process.num_steps

    @property
    def device(self) -> torch.device:
        """Where states are: the device of the reverse process's parameters, or the schedule's where it has none."""
        parameter = next(self.reverse.parameters(), None)
        return self.forward_process.schedule.device if parameter is None else parameter.device

    def top(self, dtype: torch.dtype, device: torch.device | None = None) -> dist.Distribution:
        """p(x_T), with batch_shape (), for states of a dtype and on a device, the model's if not given."""
        if self.prior is None:
            device = self.device if device is None else device
            elsewhere = {} if home(device) == device else {"device": device}
            return self.forward_process.prior(self.event_shape, dtype, **elsewhere)
        return _check_law(self.prior() if isinstance(self.prior, nn.Module) else self.prior, "prior", self.event_shape)

    def kernel(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        """p_θ(x_{t-1} | x_t)."""
        t = t if isinstance(t, Tensor) else _time(x_t, t, self.event_shape)
        return self._checked(self.reverse(x_t, t), "reverse", x_t)

    def decoded(self, kernel: dist.Distribution, x_1: Tensor) -> dist.Distribution:
        """p_θ(x_0 | x_1), from the kernel at t = 1."""
        return self._checked(self.decoder(kernel, x_1), "decoder", x_1)

    def _checked(self, law: dist.Distribution, name: str, x: Tensor) -> dist.Distribution:
        if not checks.validating():
            return law
        batch_shape, found = x.shape[: x.dim() - len(self.event_shape)], _check_law(law, name, self.event_shape)
        try:  # a state may broadcast, as under enumeration
            fits = not found.batch_shape or torch.broadcast_shapes(found.batch_shape, batch_shape)
        except RuntimeError:
            fits = False
        enumerating = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
        if not fits or (len(found.batch_shape) > len(batch_shape) and not enumerating):
            raise ValueError(
                f"{name} must return a distribution with the batch_shape {tuple(batch_shape)} of its state, but its "
                f"batch_shape is {tuple(law.batch_shape)}"
            )
        return law

    def dtype(self) -> torch.dtype:
        """The dtype of the states: that of the parameters, if there are any.

        Raises:
            ValueError: If all parameters are of half precision.
        """
        dtypes = self._dtypes()
        return dtypes[0] if dtypes else torch.get_default_dtype()

    def check(self, x_0: Tensor) -> None:
        """Refuse what cannot be data of this model.

        Raises:
            ValueError: If ``x_0`` has another shape than (B, *event_shape), another dtype or device than the model, or
                a value that no datum has; or if all parameters are of half precision.
        """
        dtypes = self._dtypes()
        if isinstance(self.decoder, Decoder):
            self.decoder.check_kind(x_0)
        self.forward_process.check(x_0, self.event_shape)
        if isinstance(self.decoder, Decoder):
            self.decoder.check(x_0)
        if dtypes and x_0.dtype not in dtypes:
            raise ValueError(f"x_0 must have the dtype of the model's parameters, {dtypes[0]}, but it is {x_0.dtype}")

    def _dtypes(self) -> list[torch.dtype]:
        """The dtypes of the parameters that states may have."""
        learned = {id(parameter) for parameter in self.forward_process.parameters()}  # of a schedule, which is float64
        parameters = [parameter for parameter in self.reverse.parameters() if id(parameter) not in learned]
        dtypes = [parameter.dtype for parameter in parameters if parameter.is_floating_point()]
        full = [dtype for dtype in dtypes if torch.finfo(dtype).bits >= 32]
        if dtypes and not full:
            checks.full_precision("weights", dtypes[0])
        return full

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, the program runs: its parameters are known to Pyro, and each random weight keeps one value.

        Random weights (each ``PyroSample``) are drawn now, before the chain and outside its plate. A ``PyroModule``
        forgets them when its outermost call returns, so the modules' contexts are kept open for all of the chain.
        """
        for name, part in self.named_children():
            _claim_names(name, part)
            if not isinstance(part, PyroModule):  # which tells Pyro of its parameters by itself
                pyro.module(name, part)
        modules = self.of_pyro()
        with ExitStack() as stack:
            for context in {id(module._pyro_context): module._pyro_context for module in modules}.values():
                stack.enter_context(context)
            for module in modules:
                for name in module._pyro_samples:
                    getattr(module, name)
            yield

    def of_pyro(self) -> list[PyroModule]:
        """The modules below that speak to Pyro by themselves, when they are called."""
        return [module for module in self.modules() if isinstance(module, PyroModule)]

    def is_random(self) -> bool:
        """Whether there are random weights, each a ``PyroSample``."""
        return any(module._pyro_samples for module in self.of_pyro())

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Within, the parts are called outside of the programs, and Pyro's param store is afterwards as it was.

        Random weights are drawn once, now.
        """
        if not self.of_pyro():  # nothing below sends a message
            yield
            return
        store = pyro.get_param_store()
        with store.scope(store.get_state()), self.running():
            yield


def _claim_names(name: str, part: nn.Module) -> None:
    """Name a part's sites and parameters after it, and let the param store hold this part's tensors under those names.

    The store is global, and Pyro would put what it holds under a name, another diffusion's tensor say, in place of a
    part's own, or train it in its stead.
    """
    for path, module in part.named_modules():
        if isinstance(module, PyroModule):
            module._pyro_name = f"{name}.{path}".rstrip(".")
    own = {f"{name}.{path}".removesuffix("_unconstrained"): parameter for path, parameter in part.named_parameters()}
    store = pyro.get_param_store()
    for key, held in list(store._params.items()):
        if own.get(key.replace("$$$", "."), held) is not held:
            store._param_to_name.setdefault(held, key)  # one tensor may stand under two names, which the store forgets
            del store[key]


class TrajectoryModel(Generative):
    """The model p_θ(x_0:T): sites ``x_T .. x_1`` and ``x_0``, in the plate "data".

    Called as ``model(x_0)``, with data of shape (B, *event_shape), it observes them; called as
    ``model(num_samples=n)`` it draws n of them. It returns ``x_0`` either way.
    """

    def forward(self, x_0: Tensor | None = None, num_samples: int | None = None) -> Tensor:
        if (x_0 is None) == (num_samples is None):
            raise ValueError(f"either x_0 or num_samples must be given, but num_samples is {num_samples!r}")
        size = checks.positive_int("num_samples", num_samples) if x_0 is None else None
        if x_0 is not None and checks.validating():
            self.check(x_0)
        with self.running():
            states = (self.dtype(), self.device) if x_0 is None else (x_0.dtype, x_0.device)
            return self._chain(x_0, len(x_0) if size is None else size, self.top(*states))

    def matches(self, guide: nn.Module) -> bool:
        """Whether this is the guide of the same diffusion."""
        return isinstance(guide, TrajectoryGuide) and guide.forward_process is self.forward_process

    def _chain(self, x_0: Tensor | None, size: int, top: dist.Distribution) -> Tensor:
        data, T = pyro.plate("data", size, dim=-1), self.num_steps
        with data:
            x = pyro.sample(f"x_{T}", top)
        for t in range(T, 1, -1):
            kernel = self.kernel(x, t)
            with data:
                x = pyro.sample(f"x_{t - 1}", kernel)
        law = self.decoded(self.kernel(x, 1), x)
        with data:
            return pyro.sample("x_0", law, obs=x_0)


class _Unscored(dist.TorchDistribution):
    """A law whose density nothing depends on, since it stands under ``mask(False)``: 0 in the dtype of the states.

    Arguments:
        law: The law, with batch_shape (B,).
        x_0: The data.
    """

    arg_constraints: ClassVar[dict] = {}

    def __init__(self, law: dist.Distribution, x_0: Tensor) -> None:
        self.law, self.x_0, self.has_rsample = law, x_0, law.has_rsample
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return self.law.support

    def expand(self, batch_shape: torch.Size, _instance: None = None) -> "_Unscored":
        return _Unscored(self.law.expand(batch_shape), self.x_0)

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return self.law.rsample(sample_shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008 - torch's own signature
        return self.law.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.x_0.new_zeros(value.shape)


class _Step(nn.Module):
    """What the two programs of the one-step pair share: the drawing of t and x_t, and the scale of the step."""

    def __init__(
        self, forward: Forward, event_shape: torch.Size, drawing: Drawing, weighting: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.forward_process, self.event_shape = forward, event_shape
        self.drawing, self.weighting = drawing, weighting

    def draw(self, x_0: Tensor, sample: Callable[[str, dist.Distribution], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The times, with shape (B,), the states x_t and the scale w(t) / p(t); ``sample`` draws from a law by name."""
        like = x_0.new_empty(len(x_0), dtype=torch.float64, device=home(x_0.device))  # exact where a t is rare
        u = sample("u", _Unscored(self.drawing.uniforms(like), x_0))
        t, probability = self.drawing(u, self.forward_process.num_steps)
        weight = self.weighting(t)
        if not isinstance(weight, Tensor) or weight.shape != t.shape:
            raise ValueError(
                f"weighting must return a tensor of the shape {tuple(t.shape)} of t, but it is "
                f"{checks.described(weight)}"
            )
        scale = (weight / probability).to(x_0.dtype).to(x_0.device)
        t = t.to(x_0.device)
        return t, sample("x_t", self.forward_process.marginal(x_0.expand(t.shape + self.event_shape), t)), scale

    @staticmethod
    @contextmanager
    def scored(scale: Tensor, where: Tensor) -> Iterator[None]:
        """Sites within cost ``scale`` times as much, and nothing but ``where``."""
        with poutine.scale(scale=scale), poutine.mask(mask=where):
            yield

    def told(self, t: Tensor, where: Tensor) -> dict[str, Callable[[Tensor], None]]:
        """The ``infer`` of a scored site, the guide's where it is latent: the drawing is told its cost."""
        return {"tell": lambda cost: self.drawing.tell(t, cost, where)}


class OneStepGuide(nn.Module):
    """The guide of the one-step pair, called as ``guide(x_0)``: see :class:`OneStep`."""

    def __init__(self, step: _Step) -> None:
        super().__init__()
        self.step = step

    def forward(self, x_0: Tensor) -> None:
        q = self.step.forward_process
        if checks.validating():
            q.check(x_0, self.step.event_shape)
        with pyro.plate("data", len(x_0), dim=-1):
            pyro.sample("x_T", q.marginal(x_0, q.num_steps))
            with poutine.mask(mask=False):
                t, x_t, scale = self.step.draw(x_0, pyro.sample)
            if q.num_steps > 1:
                with self.step.scored(scale, t > 1):  # at t = 1 the posterior is a point: another stands in, unscored
                    pyro.sample("x_s", q.posterior(x_t, x_0, t.clamp(min=2)), infer=self.step.told(t, t > 1))


class OneStepModel(Generative):
    """The model of the one-step pair, called as ``model(x_0)``: see :class:`OneStep`."""

    def __init__(self, model: TrajectoryModel, step: _Step) -> None:
        super().__init__(model.forward_process, model.reverse, model.event_shape, model.decoder, model.prior)
        self.step = step

    def forward(self, x_0: Tensor) -> None:
        if checks.validating():
            self.check(x_0)
        with self.running():
            self._score(x_0)

    def matches(self, guide: nn.Module) -> bool:
        """Whether this is the guide of the same pair."""
        return isinstance(guide, OneStepGuide) and guide.step is self.step

    def _score(self, x_0: Tensor) -> None:
        data, step = pyro.plate("data", len(x_0), dim=-1), self.step
        with data:
            pyro.sample("x_T", self.top(x_0.dtype, x_0.device))
            with poutine.mask(mask=False):
                t, x_t, scale = step.draw(x_0, pyro.sample)
        kernel = self.kernel(x_t, t)
        law = self.decoded(kernel, x_t)
        with data:
            if self.num_steps > 1:
                with step.scored(scale, t > 1):
                    pyro.sample("x_s", kernel)
            with step.scored(scale, t == 1):
                pyro.sample("x_0", law, obs=x_0, infer=step.told(t, t == 1))
