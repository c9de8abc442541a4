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
:math:`x_t \sim q(x_t | x_0)`, and scores only that step, scaled by 1 / p(t): the same bound in expectation, for one
network call, whatever T.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 34-58, https://arxiv.org/abs/2208.11970
"""

from collections.abc import Callable, Sequence

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..model.decoders import GaussianDecoder
from ..process.forward import Forward
from .programs import (
    OneStepGuide,
    OneStepModel,
    Step,
    TrajectoryGuide,
    TrajectoryModel,
    check_law,
    name_in_store,
)
from .times import BoundWeighting, Drawing, LowDiscrepancyDrawing, NoiseWeighting, SimpleWeighting

__all__ = ["Diffusion", "OneStep", "adopt_stored", "evenly_spaced"]


class Diffusion(nn.Module):
    r"""A diffusion model, as a pair of Pyro programs.

    ``diffusion.model(x_0)`` and ``diffusion.guide(x_0)`` are the trajectory pair, for any of Pyro's inference
    algorithms; ``diffusion.model(num_samples=n)`` generates; :meth:`one_step` is the one-step pair. Both come from the
    same ``forward``, ``reverse`` and ``decoder``, so a variant that changes a kernel gets everything else for free.

    The *context* of a datum is what the model is conditioned on (a label, a vector, a picture): tensors of B rows, or
    of one for all, that follow the data, ``diffusion.model(x_0, y)``, and reach the network as ``network(x_t, t, y)``.
    The bound is then one on log p(x_0 | y).

    Arguments:
        forward: The forward process q.
        reverse: The reverse process: a module called as ``reverse(x_t, t, *context)``, which returns the distribution
            :math:`p_\theta(x_{t-1} | x_t)` with batch_shape (B,) and the given event_shape.
        event_shape: The shape of one datum.
        decoder: A module called as ``decoder(kernel, x_1)``, which returns :math:`p_\theta(x_0 | x_1)`; the kernel
            itself (:class:`GaussianDecoder`) if not given.
        prior: p(x_T): a distribution with the given event_shape, or a module that returns one when called;
            ``forward.prior(event_shape)`` if not given.
        name: The prefix of the names of parameters and random weights in Pyro's param store and in traces. Two
            diffusions in one program need two names, and their sites need ``pyro.contrib.autoname.scope(prefix=...)``
            around the model and the guide of each.
        plate: The name of the plate of the data; change it if the program has another plate of that name.

    Raises:
        ValueError: If an argument is of another kind or made for another forward process, the prior has another
            event_shape, or denoiser and decoder differ in their number of levels. On a call of the programs, before any
            draw: if ``x_0`` has another shape than (B, *event_shape), another dtype or device than the model, or a
            value outside the support of ``forward``; if a context is no tensor of B rows or of one, or the reverse
            process takes another; if Pyro's param store holds other tensors under the names of the parameters, or a
            plate is around the pair; also if the reverse process, the decoder or the prior returns no distribution, or
            one of another event_shape.

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
        prior: TorchDistributionMixin | nn.Module | None = None,
        *,
        name: str = "",
        plate: str = "data",
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
            check_law(prior, "prior", event_shape)
        arguments.text("name", name, empty=True)
        arguments.text("plate", plate)
        self.model = TrajectoryModel(forward, reverse, event_shape, decoder, prior, name, plate)
        self.guide = TrajectoryGuide(forward, event_shape, plate)

    def forward(self, *args: object) -> None:
        """Refused: a diffusion is two programs.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a diffusion must be called by its programs, diffusion.model(x_0) and diffusion.guide(x_0)")

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
    def levels(self) -> int | float | None:
        """How many values a number of the data may take, where p is a probability; None where it is a density.

        It is the decoder's attribute ``levels`` or, if that is None, the forward process's.
        """
        levels = getattr(self.model.decoder, "levels", None)
        return self.forward_process.levels if levels is None else levels

    def one_step(
        self, drawing: Drawing | None = None, weighting: Callable[[Tensor], Tensor] | None = None
    ) -> "OneStep":
        """The one-step pair: one network call per batch, whatever T, and the same bound in expectation.

        Arguments:
            drawing: How t is drawn: :class:`LowDiscrepancyDrawing` if not given, which mostly has less variance than
                uniform draws.
            weighting: The weight w(t) of a step: called with integers of shape (B,), it returns positive numbers of
                that shape; 1, the bound's, if not given.

        Returns:
            The pair, with ``model`` and ``guide``.

        Raises:
            ValueError: If an argument is of another kind, or a weighting other than the bound's is used with a learned
                schedule; on a call of the programs, if the weighting returns another shape, or numbers that are
                negative or not finite.

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

        It is a model of its own: bound, samples and pairs are exactly those of the shorter chain, by the general
        posterior :math:`q(x_s | x_t, x_0)`. Fewer steps cost less, and their bound is less tight.

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
            raise ArgumentError(
                "times", f"must end at T = {self.num_steps}, the time of the given prior, but are {times!r}"
            )
        parts = {"reverse": model.reverse, "decoder": model.decoder}
        for name, part in parts.items():
            shortened = getattr(part, "subchain", None)
            if shortened is None:
                raise ArgumentError(
                    name,
                    f"must have a method subchain(forward), which returns it for a forward process of fewer "
                    f"steps, but it is a {type(part).__name__}, which has none",
                )
            parts[name] = shortened(forward)
        reverse, decoder = parts["reverse"], parts["decoder"]
        return Diffusion(forward, reverse, self.event_shape, decoder, model.prior, name=model.name, plate=model.plate)


class OneStep(nn.Module):
    """The one-step pair of a diffusion: see :meth:`Diffusion.one_step`.

    Both programs draw the auxiliary sites ``u``, which determines t, and ``x_t``, under ``mask(False)``, so that they
    cost nothing. What is scored is ``x_T`` (L_T, in closed form), and, scaled by w(t) / p(t), the site ``x_s``, s = t -
    1, where t > 1, or ``x_0`` where t = 1.
    """

    def __init__(self, diffusion: Diffusion, drawing: Drawing, weighting: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        checks.instance("diffusion", diffusion, Diffusion)
        checks.instance("drawing", drawing, Drawing)
        if not callable(weighting):
            raise ArgumentError("weighting", f"must be called with t, but it is {weighting!r}")
        checks.same_process("weighting", weighting, diffusion.forward_process)
        learned = any(parameter.requires_grad for parameter in diffusion.forward_process.parameters())
        if learned and isinstance(weighting, NoiseWeighting | SimpleWeighting):
            raise ArgumentError(
                "weighting",
                f"must be the bound's where the schedule is learned, as a {type(weighting).__name__} pays "
                f"nothing for what a schedule leaves out: give none, or schedule.requires_grad_(False)",
            )
        drawing.to(diffusion.forward_process.schedule.device)
        step = Step(diffusion.model, drawing, weighting)
        self.model, self.guide = OneStepModel(diffusion.model, step), OneStepGuide(step)


def _check_levels(reverse: nn.Module, decoder: nn.Module) -> None:
    ours, theirs = (getattr(part, "levels", None) for part in (getattr(reverse, "denoiser", None), decoder))
    if ours is not None and theirs is not None and ours != theirs:
        raise ArgumentError("decoder", f"must have the {ours} levels that the denoiser predicts, but it has {theirs}")


def evenly_spaced(num_steps: int, T: int) -> tuple[int, ...]:
    """``num_steps`` evenly spaced times in 1..T, both ends included; T alone, if it is one.

    Arguments:
        num_steps: How many, at most T.
        T: The number of steps of the whole chain.

    Raises:
        ValueError: If ``num_steps`` is no int in 1..T.
    """
    num_steps = arguments.positive_int("num_steps", num_steps)
    if num_steps > T:
        raise ArgumentError("num_steps", f"must be at most T = {T}, but it is {num_steps}")
    spaced = torch.linspace(T, 1, num_steps, dtype=torch.float64, device="cpu").round().long()
    return tuple(reversed(spaced.tolist()))


@torch.no_grad()
def adopt_stored(diffusion: Diffusion) -> None:
    """Copy the values that Pyro's param store holds under a diffusion's names into its parameters.

    A store that was saved after training by Pyro's own SVI and loaded again (``pyro.get_param_store().load(path)``)
    holds the trained values in tensors of its own; a diffusion built anew has others, and its programs refuse to run
    beside them. Afterwards the store holds the diffusion's parameters, with the stored values.

    Arguments:
        diffusion: The diffusion, of the same parts and name as the one that was trained.

    Raises:
        ValueError: If the store lacks a parameter, or holds one of another shape or dtype; then nothing is copied.

    Example:
        >>> def built():
        ...     forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=5))
        ...     network = pyrodiff.networks.MLP(event_shape=(2,))
        ...     return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, network), event_shape=(2,))
        >>> trained, again, x_0 = built(), built(), torch.ones(5, 2)
        >>> optimizer = pyro.optim.Adam({"lr": 1e-3})
        >>> svi = pyro.infer.SVI(trained.model, trained.guide, optimizer, pyro.infer.TraceMeanField_ELBO())
        >>> loss = svi.step(x_0)
        >>> before = pyrodiff.bound(trained, x_0, generator=1).nats
        >>> pyrodiff.adopt_stored(again)
        >>> torch.equal(pyrodiff.bound(again, x_0, generator=1).nats, before)
        True
    """
    checks.instance("diffusion", diffusion, Diffusion)
    store, own = pyro.get_param_store(), diffusion.model.named_for_store()
    stored = {name_in_store(key): tensor for key, tensor in store.named_parameters()}
    if not own.keys() & stored.keys():
        raise ValueError(
            f"Pyro's param store must hold the parameters of the diffusion, {next(iter(own), '')!r} say, but it holds "
            "none: Pyro's own SVI fills it; after pyrodiff.SVI use diffusion.state_dict(), or pyrodiff.checkpoints"
        )
    for name, parameter in own.items():
        if not parameter.requires_grad and name not in stored:  # Pyro stores only what is learned
            continue
        if name not in stored:
            raise ValueError(
                f"Pyro's param store must hold every parameter of the diffusion, but {name!r} is missing: give the "
                f"diffusion the name and the parts that it was trained with"
            )
        if (stored[name].shape, stored[name].dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"Pyro's param store must hold parameters of the diffusion's shapes, but {name!r} is "
                f"{arguments.described(stored[name])} there, and {arguments.described(parameter)} in the diffusion"
            )
    state = store.get_state()
    for key, (tensor, parameter) in diffusion.model.other_stored().items():
        parameter.copy_(tensor)
        state["params"][key] = parameter
    store.clear()  # setting one by one fails where a parameter has two names
    store.set_state(state)
