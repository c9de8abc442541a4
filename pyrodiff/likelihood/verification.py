r"""Verification of a diffusion of your own: each claim that its bound rests on is measured, with standard errors.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), Eqs. 46 and 58: Bayes' rule between the kernels,
    and the bound, https://arxiv.org/abs/2208.11970
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from ..base import arguments, checks
from ..base.arguments import ArgumentError
from ..base.precision import float64
from ..pair.diffusion import Diffusion, OneStep
from ..pair.elbo import DiffusionELBO
from ..running.evaluation import Batch, batches, evaluating
from .bounds import Bound, bound, importance_bound

__all__ = ["Claim", "Verification", "verify"]

_ERRORS = 5.0  # standard errors


@dataclass(frozen=True)
class Claim:
    """A claim and its result.

    Arguments:
        name: The claim.
        passed: Whether it holds; None if it could not be tested.
        found: The largest discrepancy and where, or why it could not be tested.
    """

    name: str
    passed: bool | None
    found: str

    def __str__(self) -> str:
        return f"{ {True: 'holds', False: 'FAILS', None: 'not tried'}[self.passed]:10}{self.name}\n{'':10}{self.found}"


@dataclass(frozen=True)
class Verification:
    """The claims that :func:`verify` tested. Printed, it is a list.

    Arguments:
        claims: The claims.
    """

    claims: tuple[Claim, ...]

    @property
    def passed(self) -> bool:
        """Whether no claim failed."""
        return not any(claim.passed is False for claim in self.claims)

    def __str__(self) -> str:
        return "\n".join(str(claim) for claim in self.claims)


def verify(
    diffusion: Diffusion,
    x_0: Tensor,
    *context: Tensor,
    num_repeats: int = 50,
    num_particles: int = 16,
    generator: torch.Generator | int | None = None,
    guide: Callable | None = None,
) -> Verification:
    r"""Test, on data, the claims that the bound of a diffusion rests on: for a kernel or a process of your own.

    - The trajectory pair and the one-step pair are programs with the same sites, order, scales and masks.
    - Bayes: :math:`q(x_s | x_t, x_0) \, q(x_t | x_0) = q(x_t | x_s) \, q(x_s | x_0)`, at s = t - 1 and t = 2..T.
    - The costs of the trajectory pair's sites equal, in expectation, the terms of :func:`bound`, at each t.
    - The one-step pair is unbiased for the bound, in its value and in its gradient.
    - The log weights of :func:`importance_bound` have the bound as their mean, and bounds do not rise with K.

    Random quantities may differ by 5 standard errors; the two sides of Bayes' rule, in float64, by rounding. Modules
    are in evaluation mode. It takes about ``(4 * num_repeats + 10 * num_particles) * T`` network calls on the batch,
    some of them with gradients: a few data and a short chain (:meth:`Diffusion.subchain`) are enough. If several claims
    fail, the first is mostly the cause of the others.

    Arguments:
        diffusion: The model.
        x_0: A few data, with shape (B, *event_shape).
        *context: The context of each datum, for the network: tensors of B rows, or of one for all.
        num_repeats: The number of independent evaluations of each side, at least 10.
        num_particles: The number K of trajectories of the importance-weighted bound, at least 2.
        generator: A generator or a seed, for the same draws each time; torch's global generator if not given.
        guide: The guide of random weights, which are drawn from it once: a program, called with the data (None for a
            loader) and their context. Required if there are random weights, else not allowed.

    Returns:
        The claims, which print as a list. A program that raises fails its claim, with the error as the result.

    Raises:
        ValueError: If ``x_0`` cannot be data of the model, ``diffusion`` is not one, or a number is out of range.

    Example:
        >>> forward = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(num_steps=5))
        >>> reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP(event_shape=(2,), hidden=16))
        >>> diffusion = pyrodiff.Diffusion(forward, reverse, event_shape=(2,))
        >>> pyrodiff.verify(diffusion, torch.randn(8, 2), num_repeats=10).passed
        True
    """
    checks.instance("x_0", x_0, Tensor)
    num_repeats = arguments.positive_int("num_repeats", num_repeats)
    num_particles = arguments.positive_int("num_particles", num_particles)
    for name, value, least in (("num_repeats", num_repeats, 10), ("num_particles", num_particles, 2)):
        if value < least:
            raise ArgumentError(name, f"must be at least {least}, but it is {value}")
    evaluated = evaluating(diffusion, generator, guide=guide, given=(x_0, *context))
    with _differentiable(), evaluated, pyro.validation_enabled(True):
        (data,) = batches(diffusion, x_0, context, "num_repeats")
        data = data.differentiable()
        x_0 = data.x_0
        claims = [
            _tried("the trajectory pair agrees in sites, order, scales and masks", _pair, diffusion, data),
            _tried("the one-step pair agrees in sites, order, scales and masks", _pair, diffusion.one_step(), data),
            _tried("posterior x marginal = transition x marginal, s = t - 1", _bayes, diffusion, x_0, False),
            _tried("the same from any s < t, for chains of fewer steps", _bayes, diffusion, x_0, True),
        ]
        if claims[0].passed and claims[1].passed:
            claims += _of_means(diffusion, data, num_repeats, num_particles, guide)
    return Verification(tuple(claims))


@contextmanager
def _differentiable() -> Iterator[None]:
    """A context in which gradients are taken, even inside of ``no_grad`` or inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _tried(name: str, check: Callable[..., tuple[bool | None, str]], *args: object) -> Claim:
    """Test a claim; a program that raises has failed it."""
    try:
        passed, found = check(*args)
    except Exception as error:
        passed, found = False, _said(error)
    return Claim(name, passed, found)


def _pair(pair: Diffusion | OneStep, data: Batch) -> tuple[bool, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the warning of another order
        terms = DiffusionELBO().terms(pair.model, pair.guide, data.x_0, *data.context)
    broken = [name for name, cost in terms.items() if not bool(cost.isfinite().all())]
    if broken:
        return False, f"the cost is not finite at {', '.join(broken)}"
    return True, f"{len(terms)} sites with a cost, from {next(iter(terms))} on"


@torch.no_grad()
def _bayes(diffusion: Diffusion, x_0: Tensor, any_s: bool) -> tuple[bool | None, str]:
    """Both sides of Bayes' rule as log densities, at t = 2..T, from s = t - 1, or from a random s before that."""
    x_0 = float64(x_0) if x_0.is_floating_point() else x_0  # so that rounding does not hide an error
    q, worst, wrong = diffusion.forward_process, (-1.0, 0, 0), []
    for t in range(3 if any_s else 2, diffusion.num_steps + 1):
        s = int(torch.randint(1, t - 1, (), device="cpu")) if any_s else t - 1
        x_s = q.marginal(x_0, s).sample()
        x_t = q.transition(x_s, t, s).sample()
        left = q.posterior(x_t, x_0, t, s).log_prob(x_s), q.marginal(x_0, t).log_prob(x_t)
        right = q.transition(x_s, t, s).log_prob(x_t), q.marginal(x_0, s).log_prob(x_s)
        off = (left[0] + left[1] - right[0] - right[1]).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        worst = max(worst, (float(off.max()), s, t))
        rounding = 10 * math.sqrt(torch.finfo(off.dtype).eps) * (1 + sum(term.abs() for term in (*left, *right)))
        if not bool(((off <= rounding) & off.isfinite()).all()):
            wrong.append(t)
    if worst[0] < 0:
        return None, f"there is no such step with T = {diffusion.num_steps}"
    by = f"log densities differ by at most {worst[0]:.1e} nats, at s = {worst[1]}, t = {worst[2]}"
    return (True, by) if not wrong else (False, f"{by}; beyond rounding at t = {_listed(wrong)}")


def _of_means(
    diffusion: Diffusion, data: Batch, num_repeats: int, num_particles: int, guide: Callable | None
) -> list[Claim]:
    """The claims about means over fresh draws, each a comparison of two sets of them."""
    T, given, rows = diffusion.num_steps, (data.x_0, *data.context), torch.arange(len(data), device=data.x_0.device)
    every = data.rows(rows.repeat(math.ceil(T / len(data))))  # at least T: low-discrepancy draws include every t
    again = data.rows(rows.repeat(num_repeats))  # each of them has draws of its own
    drawn = None if guide is None else lambda *_: guide(*given)  # the weights, of the data as they are
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of one large step, or of heavy tails: not what is tested
            bounds = _of_bound(bound(diffusion, again.x_0, *again.context, guide=drawn), num_repeats)
            weights, groups = (
                float64(importance_bound(diffusion, *given, num_particles=number, guide=guide).log_weights)
                for number in (num_repeats, 10 * num_particles)
            )
        learned: dict[str, Tensor] = {name: p for name, p in diffusion.model.named_parameters() if p.requires_grad}
        signs = [torch.randint_like(parameter, 2) * 2 - 1 for parameter in learned.values()]
        sites, gradients = _estimates(diffusion, data, num_repeats, learned, signs)
        steps, step_gradients = _estimates(diffusion.one_step(), every, num_repeats, learned, signs)
    except Exception as error:
        return [Claim("its bounds can be evaluated", False, _said(error))]
    terms = [f"L_{t}" + f" (t = {t + 1})" * (t < T) for t in range(T + 1)]
    totals, loose = bounds.sum(1, keepdim=True), -weights.mean(1, keepdim=True)
    tight = (math.log(num_particles) - groups.unflatten(0, (10, num_particles)).logsumexp(1)).mean(1)
    return [
        _alike("the sites of the trajectory pair cost what the bound's terms say", sites, bounds, terms),
        _alike("the one-step pair is unbiased for the bound", steps.sum(1, keepdim=True), totals, ["the bound"]),
        _alike("and so is its gradient", step_gradients, gradients, list(learned)),
        _alike("the log weights have the bound as their mean", loose, totals, ["the bound"]),
        _falls(loose[:, 0], tight, num_particles),
    ]


def _of_bound(bound: Bound, number: int) -> Tensor:
    """The mean terms L_0, L_1, ..., L_T over the data, each of which is there so often, with shape (number, T + 1)."""
    terms = float64(torch.cat([bound.reconstruction[None], bound.denoising, bound.prior[None]]))
    return terms.unflatten(1, (number, -1)).mean(2).T


def _estimates(
    pair: Diffusion | OneStep, data: Batch, number: int, learned: dict[str, Tensor], signs: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Independent estimates of a pair, averaged over the data: the cost of each site, the last site first, and the
    gradient. Each parameter's gradient is reduced to one number, its product with random signs.
    """
    parameters = list(learned.values())
    costs, gradients = [], []
    for _ in range(number):
        terms = DiffusionELBO().terms(pair.model, pair.guide, data.x_0, *data.context)
        means = torch.stack([float64(terms[name]).sum() / len(data) for name in reversed(terms)])
        found = torch.autograd.grad(means.sum(), parameters, allow_unused=True) if means.requires_grad else ()
        costs.append(means.detach())
        gradients.append([0.0 if g is None else float((g * sign).sum()) for g, sign in zip(found, signs, strict=False)])
    return torch.stack(costs).cpu(), torch.tensor(gradients, dtype=torch.float64, device="cpu")


def _alike(name: str, ours: Tensor, theirs: Tensor, names: list[str]) -> Claim:
    """Whether two sets of draws, with shapes (R, n) and (S, n), have the same means."""
    ours, theirs = ours.cpu().double(), theirs.cpu().double()
    if ours.shape[1] == 0:
        return Claim(name, None, "there is nothing to learn")
    if ours.shape[1] != len(names) or theirs.shape[1] != len(names):
        return Claim(
            name, False, f"there are {ours.shape[1]} and {theirs.shape[1]} numbers where {len(names)} are expected"
        )
    error = (ours.var(0) / len(ours) + theirs.var(0) / len(theirs)).sqrt()
    size = ours.mean(0).abs() + theirs.mean(0).abs()
    errors = (ours.mean(0) - theirs.mean(0)).abs() / (error + 1e-6 * size + 1e-12)
    errors = errors.nan_to_num(nan=math.inf)
    worst = int(errors.argmax())
    numbers = f"{float(ours[:, worst].mean()):.5g} against {float(theirs[:, worst].mean()):.5g} at {names[worst]}"
    found = f"largest difference {float(errors[worst]):.1f} standard errors, {numbers}"
    wrong = [names[i] for i in (errors > _ERRORS).nonzero()[:, 0].tolist()]
    return Claim(name, not wrong, found + f"; beyond {_ERRORS:g} at {_listed(wrong)}" * bool(wrong))


def _falls(loose: Tensor, tight: Tensor, num_particles: int) -> Claim:
    """Whether the mean of the second set of draws is not above that of the first."""
    loose, tight = loose.cpu(), tight.cpu().flatten()
    error = math.sqrt(float(loose.var() / len(loose) + tight.var() / len(tight)))
    rise = float(tight.mean() - loose.mean())
    found = f"{float(loose.mean()):.5g} nats at K = 1, {float(tight.mean()):.5g} at K = {num_particles} (± {error:.2g})"
    return Claim("bounds do not rise with K", rise <= _ERRORS * error + 1e-6 * abs(float(loose.mean())), found)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]  # Pyro adds the shapes of the trace below


def _listed(items: list) -> str:
    return ", ".join(str(item) for item in items[:5]) + f" and {len(items) - 5} more" * (len(items) > 5)
