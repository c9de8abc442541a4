"""Priors on a diffusion and diffusions as priors, against posteriors and evidences in closed form."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import ShiftedGaussian, far, gaussian_diffusion, repeat
from oracles import log_snr_betas
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineTransform
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

import pyrodiff
from pyrodiff import SVI, DiffusionDistribution, DiffusionELBO, FlowEstimate, OneStepEstimate

LOG_2PI = math.log(2 * math.pi)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def fall(lr, decay):
    """Adam, and its learning rate falling."""
    return {
        "optim": lambda parameters: torch.optim.Adam(parameters, lr=lr),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, decay),
    }


# All weights: x_0 is estimated as w x_t + c at every t, with Gaussian priors on w and c

X = number([[0.9, -0.3], [1.4, 0.2], [-0.5, 0.8], [1.1, 1.7], [0.3, 0.6]])
T, FIRST, LAST = 4, 3.0, -3.0
LOC, SCALE = number([0.5, -0.2]), number([0.4, 0.3])
WEIGHT = "reverse.denoiser.network.weight"


class Line(PyroModule):
    """w x_t + c."""

    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(LOC, SCALE).to_event(1))

    def forward(self, x_t, t):
        return self.weight[0] * x_t + self.weight[1]


def line():
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T, FIRST, LAST))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(Line(), forward))
    return pyrodiff.Diffusion(forward, reverse, event_shape=(2,))


def steps():
    """(k_t, constant, gain, variance) with L_{t-1} = constant + k_t E (x_0 - estimate)^2, a number; q(x_t | x_0)."""
    betas = np.array(log_snr_betas(T, FIRST, LAST))
    alpha_bars = np.concatenate([[1.0], np.cumprod(1 - betas)])
    for t in range(1, T + 1):
        before, now, beta = alpha_bars[t - 1], alpha_bars[t], betas[t - 1]
        if t == 1:
            k, constant = 1 / (2 * beta), 0.5 * math.log(2 * math.pi * beta)
        else:
            ratio = (1 - before) / (1 - now)  # of the posterior's variance and the kernel's, beta
            k, constant = before * (beta / (1 - now)) ** 2 / (2 * beta), 0.5 * (ratio - 1 - math.log(ratio))
        yield k, constant, math.sqrt(now), 1 - now
    yield 0.0, None, math.sqrt(now), 1 - now


def of_weights():
    """Mean and precision of p(w) exp(-bound(w)) for the data X, and -log of its integral."""
    x, D = X.numpy().ravel(), X.numel()
    precision, h, rest = np.diag(1 / SCALE.numpy() ** 2), LOC.numpy() / SCALE.numpy() ** 2, 0.0
    rest += 0.5 * (LOC.numpy() ** 2 / SCALE.numpy() ** 2).sum() + np.log(SCALE.numpy()).sum()
    for k, constant, gain, variance in steps():
        if constant is None:  # L_T, KL(q(x_T | x_0) || N(0, 1))
            rest += 0.5 * (variance - 1 - math.log(variance) + gain**2 * x**2).sum()
            continue
        second, first = gain**2 * x**2 + variance, gain * x
        precision = precision + 2 * k * np.array([[second.sum(), first.sum()], [first.sum(), D]])
        h = h + 2 * k * np.array([(x * first).sum(), x.sum()])
        rest += D * constant + k * (x**2).sum()
    mean = np.linalg.solve(precision, h)
    evidence = rest - 0.5 * h @ mean + 0.5 * np.linalg.slogdet(precision)[1]
    return torch.tensor(mean), torch.tensor(precision), evidence


def exact_guide(*args):
    mean, precision, _ = of_weights()
    pyro.sample(WEIGHT, dist.MultivariateNormal(mean, precision_matrix=precision))


def with_chain(guide, pair):
    def whole(x_0):
        guide(x_0)
        pair.guide(x_0)

    return whole


def test_under_the_posterior_of_all_weights_the_bound_of_all_data_is_the_evidence():
    """Of a linear estimate with Gaussian weights, conjugate: the KL of the weights counts once, not per datum."""
    diffusion, (_, _, evidence) = line(), of_weights()
    draws = repeat(30, lambda: pyrodiff.bound(diffusion, X, guide=exact_guide, num_particles=6).total)
    assert not far(draws, evidence)
    small = {"batch_size": 3}  # of small runs, each with a draw of the weights, it is the same
    for pair, options in ((diffusion, {}), (diffusion.one_step(), small)):
        programs = pair.model, with_chain(exact_guide, pair)
        draws = repeat(12, lambda p=programs, o=options: pyrodiff.pair_bound(*p, X, num_particles=6, **o).total)
        assert not far(draws, evidence)


def test_under_another_law_of_the_weights_it_is_above_by_the_divergence():
    diffusion, (mean, precision, evidence) = line(), of_weights()
    other = torch.distributions.MultivariateNormal(mean + 0.1, covariance_matrix=torch.diag(number([0.03, 0.02])))
    gap = torch.distributions.kl_divergence(
        other, torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    )

    def guide(*args):
        pyro.sample(WEIGHT, dist.MultivariateNormal(other.loc, scale_tril=other.scale_tril))

    draws = repeat(30, lambda: pyrodiff.bound(diffusion, X, guide=guide, num_particles=12).total)
    assert float(gap) > 1
    assert not far(draws, evidence + float(gap))


def weights_alone(diffusion, num_draws, seed=None):
    """A program whose only latent sites are the weights; what they make of the data is a factor, the bound given them.

    Arguments:
        diffusion: The diffusion.
        num_draws: The draws of x_1:T that the bound is the mean of.
        seed: Their seed, for the same bound each time.
    """

    def program(x_0):
        values = {WEIGHT: pyro.sample(WEIGHT, dist.Normal(LOC, SCALE).to_event(1))}
        given = poutine.condition(diffusion.model, data=values)
        with poutine.block(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            many = x_0.repeat(num_draws, 1)
            terms = DiffusionELBO().terms(given, diffusion.guide, many)
        pyro.factor("data", -sum(term.sum() for name, term in terms.items() if name not in values) / num_draws)

    return program


def test_a_mean_field_guide_finds_its_best_and_the_bound_says_what_it_costs():
    """The best has the means of the posterior and the inverse roots of the diagonal of its precision."""
    diffusion, (mean, precision, evidence) = line(), of_weights()
    guide = AutoNormal(poutine.block(diffusion.model, expose=[WEIGHT]))
    svi = SVI(diffusion.model, with_chain(guide, diffusion), loss=DiffusionELBO(num_particles=2), **fall(0.1, 0.97))
    for _ in range(130):
        svi.step(X)
    scale = precision.diagonal().rsqrt()
    found = guide.quantiles([0.5, 0.5 + 0.5 * math.erf(1 / math.sqrt(2))])[WEIGHT].detach()
    torch.testing.assert_close(found[0], mean, atol=0.2 * float(scale.min()), rtol=0)
    torch.testing.assert_close(found[1] - found[0], scale, rtol=0.1, atol=0)
    gap = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    draws = repeat(20, lambda: pyrodiff.bound(diffusion, X, guide=guide, num_particles=12).total)
    assert float(gap) > 0.05
    assert abs(float(draws.mean()) - evidence - float(gap)) < 5 * float(draws.std()) / 20**0.5 + 0.03


def test_laplace_is_exact_where_the_bound_is_quadratic():
    diffusion, (mean, precision, evidence) = line(), of_weights()
    program = weights_alone(diffusion, num_draws=500, seed=1)
    guide = AutoLaplaceApproximation(program)
    svi = SVI(program, guide, loss=DiffusionELBO(), **fall(0.1, 0.94))
    for _ in range(75):
        svi.step(X)
    found = guide.laplace_approximation(X)
    torch.testing.assert_close(found.get_posterior().precision_matrix.detach(), precision, rtol=0.05, atol=0)
    torch.testing.assert_close(found.get_posterior().mean.detach(), mean, rtol=0, atol=0.03)
    draws = repeat(20, lambda: pyrodiff.bound(diffusion, X, guide=found, num_particles=12).total)
    assert abs(float(draws.mean()) - evidence) < 5 * float(draws.std()) / 20**0.5 + 0.03


# The decoder's scale


class Noise(PyroModule):
    """p(x_0 | x_1) with a precision of its own, Gamma a priori."""

    def __init__(self, concentration, rate):
        super().__init__()
        self.precision = PyroSample(dist.Gamma(number(concentration), number(rate)))

    def forward(self, kernel, x_1):
        mean = kernel.base_dist.mean
        return dist.Normal(mean, self.precision.rsqrt().expand(mean.shape)).to_event(1)


def test_the_scale_of_the_decoder_has_its_gamma_posterior():
    """Found by SVI, with the evidence of all data as its bound."""
    m, v, (a, b) = number([0.6, -0.4]), number([0.7, 0.5]), (3.0, 0.5)
    plain = gaussian_diffusion(pyrodiff.LogSNRSchedule(T, FIRST, LAST), m, v)
    forward, reverse, prior = plain.forward_process, plain.reverse, plain.model.prior
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,), decoder=Noise(a, b), prior=prior).requires_grad_(False)
    gain, scale = forward.schedule.scales(1)
    total = gain**2 * v + scale**2
    known = 1 - gain**2 * v / total  # x_0 minus the mean of the kernel is this part of x_0 - m, less the noise's
    square = (known * (X - m)) ** 2 + (gain * v / total) ** 2 * scale**2
    kernel = v * scale**2 / total  # the exact last step, whose cost is in -log p(x_0)
    of_last = (0.5 * (LOG_2PI + kernel.log() + square / kernel)).sum()
    rest = -dist.Normal(m, v.sqrt()).log_prob(X).sum() - of_last
    a_n, b_n = a + X.numel() / 2, b + float(square.sum()) / 2
    evidence = float(rest) + X.numel() / 2 * LOG_2PI - a * math.log(b) + math.lgamma(a)
    evidence += a_n * math.log(b_n) - math.lgamma(a_n)

    def guide(*args):
        shape, rate = (
            pyro.param(name, number(value), constraint=constraints.positive)
            for name, value in (("shape", a_n), ("rate", b_n))
        )
        pyro.sample("decoder.precision", dist.Gamma(shape, rate))

    draws = repeat(30, lambda: pyrodiff.bound(diffusion, X, guide=guide, num_particles=2).total)
    assert not far(draws, evidence)

    learned = {"shape": number(1.0).requires_grad_(), "rate": number(0.0).requires_grad_()}  # their logarithms

    def learning(x_0):
        pyro.sample("decoder.precision", dist.Gamma(learned["shape"].exp(), learned["rate"].exp()))
        diffusion.guide(x_0)

    optimizer, elbo, found = torch.optim.Adam(learned.values(), lr=0.1), DiffusionELBO(), []
    for step in range(250):
        optimizer.zero_grad()
        elbo.loss_and_grads(diffusion.model, learning, X)
        optimizer.step()
        if step >= 100:
            found.append(torch.stack(list(learned.values())).detach())
    shape, rate = torch.stack(found).mean(0).exp().tolist()
    assert shape / rate == pytest.approx(a_n / b_n, rel=0.05)
    assert shape == pytest.approx(a_n, rel=0.15)


# A learned schedule


class Half(nn.Module):
    """The velocity x_t / 2: x_0 is estimated as (a_t - b_t / 2) x_t."""

    def forward(self, x_t, t):
        return x_t / 2


def bound_at(logits, x):
    """The bound of all data in closed form at a draw of logit beta_2, with shape (n,), as D independent numbers."""
    first, second = 0.3, torch.sigmoid(logits)
    kept = (1 - first, (1 - first) * (1 - second))  # alpha bar
    x = x.flatten()

    def error(alpha_bar):  # E (x_0 - g x_t)^2, summed
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        g = a - b / 2
        return (1 - g * a) ** 2 * (x**2).sum() + len(x) * g**2 * b**2

    ratio = (1 - kept[0]) / (1 - kept[1])
    last = 0.5 * len(x) * math.log(2 * math.pi * first) + error(kept[0]) / (2 * first)
    middle = 0.5 * len(x) * (ratio - 1 - ratio.log())
    middle = middle + kept[0] * second / (1 - kept[1]) ** 2 * error(kept[1]) / 2
    top = 0.5 * (len(x) * (-kept[1] - torch.log(1 - kept[1])) + kept[1] * (x**2).sum())
    return last + middle + top


def test_under_a_prior_on_a_beta_the_bound_of_all_data_is_that_of_quadrature():
    x, schedule = X.repeat(8, 1), pyrodiff.LearnedBetaSchedule([0.3, 0.5])
    forward = pyrodiff.GaussianForward(schedule)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(Half(), forward))
    diffusion, one = pyrodiff.Diffusion(forward, reverse, (2,)), torch.ones(1, dtype=torch.float64)
    del schedule.logits
    schedule.logits = 0 * one
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    log_joint = dist.Normal(0 * one, one).log_prob(grid) - bound_at(grid, x)
    evidence = -float(torch.logsumexp(log_joint, 0) + math.log(24 / 20000))
    posterior = (log_joint + evidence).exp() * 24 / 20000
    loc = (posterior * grid).sum()
    scale = (posterior * (grid - loc) ** 2).sum().sqrt()
    q = torch.distributions.Normal(loc, scale)
    gap = (q.log_prob(grid).exp() * (q.log_prob(grid) - log_joint - evidence)).sum() * 24 / 20000

    def program(law, chain):
        def run(x_0):
            schedule.logits = pyro.sample("logit", law.expand([1]).to_event(1))
            chain(x_0)

        return run

    for pair, particles in ((diffusion, 5), (diffusion.one_step(), 15)):
        model, guide = program(dist.Normal(0 * loc, 1.0), pair.model), program(dist.Normal(loc, scale), pair.guide)
        draws = repeat(12, lambda m=model, g=guide, k=particles: pyrodiff.pair_bound(m, g, x, num_particles=k).total)
        assert not far(draws, evidence + float(gap))
    assert 0 < float(gap) < 0.1
    assert abs(float(loc)) > 0.3

    def at_a_draw():  # the bound term by term of the chain that a draw has
        schedule.logits = q.sample((1,))
        prior = dist.Normal(0 * one, one).log_prob(schedule.logits) - q.log_prob(schedule.logits)
        return pyrodiff.bound(diffusion, x, num_particles=4).total - prior.sum()

    assert not far(repeat(40, at_a_draw), evidence + float(gap))


# Groups around one diffusion: x = shift + scale u, with u of the diffusion, and shifts that are drawn around one mean

M, V, TAU = number([0.6, -0.4]), number([0.7, 0.5]), 0.6
SCALES = number([0.5, 1.0, 2.0])
GROUPS = number([[[1.2, 0.3], [0.4, -0.9]], [[2.0, -1.0], [0.1, 0.2]], [[-1.5, 0.9], [0.3, -2.0]]])  # (group, datum, D)
SHARED = gaussian_diffusion(pyrodiff.CosineSchedule(20), M, V)


def base(reference=(M, V)):
    return DiffusionDistribution(SHARED, estimate=OneStepEstimate(reference=reference))


def moved(law, shift, scale):
    """The law of shift + scale u; a scale has all of the event's dimensions, or torch counts it once for all."""
    return dist.TransformedDistribution(law, [AffineTransform(shift, scale.expand(shift.shape), event_dim=1)])


def evidence_of_groups():
    """log p of all data: jointly Gaussian, number by number."""
    n, total = GROUPS.shape[1], 0.0
    noise = SCALES.repeat_interleave(n)
    same = torch.block_diag(*(torch.ones(n, n, dtype=torch.float64) for _ in SCALES))
    for d in range(2):
        covariance = 1 + TAU**2 * same + torch.diag(noise**2 * V[d])
        total += dist.MultivariateNormal(noise * M[d], covariance).log_prob(GROUPS[..., d].flatten())
    return float(total)


def of_mean():
    """Mean and deviation of the mean of all shifts, given the data."""
    variance = TAU**2 + SCALES[:, None] ** 2 * V / GROUPS.shape[1]  # of a group's mean, given the mean of all
    precision = 1 + (1 / variance).sum(0)
    return ((GROUPS.mean(1) - SCALES[:, None] * M) / variance).sum(0) / precision, precision.rsqrt()


def of_shift(mean, i):
    """Mean and deviation of the shifts of groups given the mean of all, and the data, with shape (groups, 2)."""
    noise = SCALES[i, None] ** 2 * V / GROUPS.shape[1]
    precision = 1 / TAU**2 + 1 / noise
    own = GROUPS[i].mean(1) - SCALES[i, None] * M
    return (mean / TAU**2 + own / noise) / precision, precision.rsqrt()


def groups(law, subsample_size=None):
    """The programs: groups in rows, data in columns."""

    def model():
        mean = pyro.sample("mean", dist.Normal(number([0.0, 0.0]), 1.0).to_event(1))
        with pyro.plate("groups", len(SCALES), subsample_size, dim=-2) as i:
            shift = pyro.sample("shift", dist.Normal(mean.expand(len(i), 1, 2), TAU).to_event(1))
            with pyro.plate("data", GROUPS.shape[1], dim=-1):
                pyro.sample("x", moved(law, shift, SCALES[i, None, None]), obs=GROUPS[i])

    def guide():
        loc, scale = of_mean()
        mean = pyro.sample("mean", dist.Normal(loc, scale).to_event(1))
        with pyro.plate("groups", len(SCALES), subsample_size, dim=-2) as i:
            loc, scale = of_shift(mean, i)
            pyro.sample("shift", dist.Normal(loc[:, None], scale[:, None]).to_event(1))

    return model, guide


def test_under_the_posterior_of_partial_pooling_the_elbo_is_the_evidence():
    """At each draw where the estimate has no noise: then p(x, shifts, mean) / q is p(x)."""
    with torch.no_grad():
        found = repeat(5, lambda: -Trace_ELBO().loss(*groups(base())))
        torch.testing.assert_close(found, torch.full_like(found, evidence_of_groups()), atol=1e-6, rtol=0)
        for kind in (TraceMeanField_ELBO, DiffusionELBO):
            assert not far(repeat(40, lambda k=kind: -k().loss(*groups(base()))), evidence_of_groups())
        assert not far(repeat(50, lambda: -Trace_ELBO().loss(*groups(base(None)))), evidence_of_groups())
    shift, _ = of_shift(of_mean()[0], torch.arange(3))
    own = GROUPS.mean(1) - SCALES[:, None] * M
    assert ((shift - of_mean()[0]).abs() < (own - of_mean()[0]).abs()).all()  # drawn together


@pytest.mark.parametrize("kind", [Trace_ELBO, DiffusionELBO])
def test_some_of_the_groups_stand_for_all(kind):
    with torch.no_grad():
        draws = repeat(60, lambda: -kind().loss(*groups(base(), subsample_size=2)))
    assert not far(draws, evidence_of_groups())
    assert float(draws.std()) > 1


def test_the_bound_of_pairs_takes_groups_as_what_all_data_share():
    """Of data in rows, with their group as context, in runs of any size."""
    x, group = GROUPS.flatten(0, 1), torch.arange(3).repeat_interleave(2)

    def model(x, group):
        mean = pyro.sample("mean", dist.Normal(number([0.0, 0.0]), 1.0).to_event(1))
        with pyro.plate("groups", 3):
            shift = pyro.sample("shift", dist.Normal(mean.expand(3, 2), TAU).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", moved(base(), shift[group], SCALES[group, None]), obs=x)

    def guide(x, group):
        mean = pyro.sample("mean", dist.Normal(*of_mean()).to_event(1))
        with pyro.plate("groups", 3):
            pyro.sample("shift", dist.Normal(*of_shift(mean, torch.arange(3))).to_event(1))

    for batch_size in (6, 4):
        found = [pyrodiff.pair_bound(model, guide, x, group, batch_size=batch_size, generator=s) for s in range(25)]
        assert not far(number([one.total for one in found]), -evidence_of_groups())
    assert set(found[0].global_terms) == {"mean", "shift"}
    assert len(found[0].nats) == 6


def test_a_group_has_a_scale_of_its_own_too():
    """Value and gradients of the ELBO, with shift and log scale Gaussian in the guide: moments of log-normals."""
    x = GROUPS[0]
    learned = [number(value).requires_grad_() for value in ([0.3, -0.2], [0.5, 0.4], [0.1, 0.3], [0.2, 0.3])]
    loc, scale, log_loc, log_scale = learned

    def model():
        shift = pyro.sample("shift", dist.Normal(number([0.0, 0.0]), 1.0).to_event(1))
        size = pyro.sample("scale", dist.LogNormal(number([0.0, 0.0]), 0.5).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", moved(base(), shift, size), obs=x)

    def guide():
        pyro.sample("shift", dist.Normal(loc, scale).to_event(1))
        pyro.sample("scale", dist.LogNormal(log_loc, log_scale).to_event(1))

    def once():
        loss = DiffusionELBO(num_particles=4).differentiable_loss(model, guide)
        return torch.cat([loss[None], *torch.autograd.grad(loss, learned)])

    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(loc, scale), normal(0.0, 1.0))
    kl = kl + torch.distributions.kl_divergence(normal(log_loc, log_scale), normal(0.0, 0.5))
    inverse, inverse_square = (torch.exp(-k * log_loc + k**2 * log_scale**2 / 2) for k in (1, 2))
    square = ((x - loc) ** 2 + scale**2) * inverse_square - 2 * M * (x - loc) * inverse + M**2
    cost = 0.5 * (LOG_2PI + V.log() + square / V) + log_loc
    expected = kl.sum() + cost.sum()
    expected = torch.cat([expected[None], *torch.autograd.grad(expected, learned)]).detach()
    assert not far(repeat(40, once), expected)


# Labels, some of them missing; a mixture of two diffusions

ENUMERATE = {"enumerate": "parallel"}
PI = number([0.5, 0.3, 0.2])
CENTERS = number([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.5]])
LABELS = torch.tensor([1, -1, -1, 0, -1])  # -1 where it is missing


def by_label():
    schedule = pyrodiff.ReciprocalSchedule(6)
    return pyrodiff.Diffusion(pyrodiff.GaussianForward(schedule), ShiftedGaussian(schedule, M, V), (2,))


def log_joint(m=M):
    """log p(x, y) for each datum and label."""
    return PI.log() + dist.Normal(CENTERS + m, V.sqrt()).to_event(1).log_prob(X[:, None])


def labelled(diffusion, logits, estimate=None):
    """The programs: where a label is known, the guide is sure of it; elsewhere all labels are summed over."""

    def model():
        with pyro.plate("data", len(X)):
            y = pyro.sample("y", dist.Categorical(PI))
            law = DiffusionDistribution(diffusion, CENTERS[y], batch_dim=y.dim(), estimate=estimate)
            pyro.sample("x", law, obs=X)

    def guide():
        sure = nn.functional.one_hot(LABELS.clamp(min=0), 3).double()
        q = torch.where(LABELS[:, None] < 0, logits.softmax(-1), sure)
        with pyro.plate("data", len(X)):
            pyro.sample("y", dist.Categorical(q), infer=ENUMERATE)

    return model, guide


def test_missing_labels_are_summed_over_and_known_ones_are_not():
    """At the responsibilities the ELBO is log p(x, y) where y is known and log p(x) where not, with its gradients."""
    diffusion, m = by_label(), M.clone().requires_grad_()
    logits, elbo = log_joint().clone().requires_grad_(), TraceEnum_ELBO(max_plate_nesting=1)
    programs = labelled(diffusion, logits, OneStepEstimate(num_draws=15))

    def once():
        loss = elbo.differentiable_loss(*programs)
        return torch.cat([loss[None], *(g.flatten() for g in torch.autograd.grad(loss, [diffusion.reverse.m, logits]))])

    each = log_joint(m)
    known = LABELS >= 0
    expected = -each[known, LABELS[known]].sum() - each[~known].logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(expected, m)
    assert not far(repeat(60, once), torch.cat([expected[None], gradient, torch.zeros(15)]).detach())


def test_the_mask_of_pyros_observed_labels_stands_in_the_guide_too():
    """Else the ELBO is above log p, and Pyro says nothing."""
    diffusion, known, each = by_label().requires_grad_(False), LABELS >= 0, log_joint()

    def model():
        with pyro.plate("data", len(X)):
            y = pyro.sample("y", dist.Categorical(PI), obs=LABELS.clamp(min=0), obs_mask=known)
            law = DiffusionDistribution(diffusion, CENTERS[y], batch_dim=y.dim(), estimate=OneStepEstimate(num_draws=6))
            pyro.sample("x", law, obs=X)

    def guide(mask):
        with pyro.plate("data", len(X)), poutine.mask(mask=mask):
            pyro.sample("y_unobserved", dist.Categorical(each.softmax(-1)), infer=ENUMERATE)

    torch.set_default_dtype(torch.float64)  # Pyro counts in the default dtype where there is a mask
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    expected = -each[known, LABELS[known]].sum() - each[~known].logsumexp(-1).sum()
    draws = repeat(50, lambda: elbo.loss(model, lambda: guide(~known)))
    assert not far(draws, expected)
    unmasked = repeat(50, lambda: elbo.loss(model, lambda: guide(known | ~known)))
    assert float(unmasked.mean() + 5 * unmasked.std() / 50**0.5) < float(expected)


def test_svi_finds_the_missing_labels():
    logits = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    model, guide = labelled(by_label().requires_grad_(False), logits, OneStepEstimate(num_draws=12))
    optimizer, found = torch.optim.Adam([logits], lr=0.1), []
    for step in range(160):
        optimizer.zero_grad()
        TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide).backward()
        optimizer.step()
        if step >= 80:
            found.append(logits.detach().softmax(-1))
    missing = LABELS < 0
    expected = log_joint().softmax(-1)[missing]
    assert (torch.stack(found).mean(0)[missing] - expected).abs().max() < 0.04
    assert ((expected > 0.1) & (expected < 0.9)).any()


MEANS, MIXED = (M, M + number([1.5, -1.0])), torch.cat([X, X + number([1.2, -0.8])])


def one_step(diffusion, mean):
    return DiffusionDistribution(diffusion, estimate=OneStepEstimate(reference=(mean, V)))


def mixture(law, infer=None):
    """A program of data that are of the one diffusion or of the other, as a bit says."""
    diffusions = [gaussian_diffusion(pyrodiff.CosineSchedule(20), m, V).requires_grad_(False).eval() for m in MEANS]
    second, first = (law(diffusion, m) for diffusion, m in zip(diffusions, MEANS, strict=True))

    def model(rate):
        with pyro.plate("data", len(MIXED)):
            c = pyro.sample("c", dist.Bernoulli(rate), infer=infer or {})
            pyro.sample("x", dist.MaskedMixture(c == 1, second, first), obs=MIXED)

    return model


def log_mixture(rate):
    """log p(c, x) for c = 1 and c = 0, with shape (B, 2)."""
    laws = [dist.Normal(m, V.sqrt()).to_event(1).log_prob(MIXED) for m in reversed(MEANS)]
    return torch.stack(laws, -1) + torch.stack([rate, 1 - rate]).log()


def test_a_mixture_of_two_diffusions_has_its_responsibilities():
    """Gradient steps find these and the weight of the first as EM does; the ELBO is then log p of the data."""
    rate, model, elbo = number(0.5), mixture(one_step), TraceEnum_ELBO(max_plate_nesting=1)
    for _ in range(300):
        rate = log_mixture(rate).softmax(-1)[:, 0].mean()
    raw, logits = number(0.0).requires_grad_(), number([0.0] * len(MIXED)).requires_grad_()

    def guide(rate):
        with pyro.plate("data", len(MIXED)):
            pyro.sample("c", dist.Bernoulli(logits=logits), infer=ENUMERATE)

    optimizer = torch.optim.Adam([raw, logits], lr=0.3)
    for _ in range(110):
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(model, guide, raw.sigmoid())
        loss.backward()
        optimizer.step()
    assert float(raw.detach().sigmoid()) == pytest.approx(float(rate), abs=0.01)
    torch.testing.assert_close(logits.detach().sigmoid(), log_mixture(rate).softmax(-1)[:, 0], atol=0.01, rtol=0)
    assert float(loss.detach()) == pytest.approx(-float(log_mixture(rate).logsumexp(-1).sum()), abs=0.05)
    assert 0.05 < float(rate) < 0.95


def test_the_flow_may_be_summed_over_in_the_model():
    """Pyro then has the responsibilities by itself; the one-step estimate is refused, whatever makes the mixture."""
    rate, elbo = number(0.4), TraceEnum_ELBO(max_plate_nesting=1)

    def empty(rate):
        pass

    model = mixture(lambda diffusion, mean: DiffusionDistribution(diffusion, estimate=FlowEstimate()), ENUMERATE)
    expected = log_mixture(rate)
    assert elbo.loss(model, empty, rate) == pytest.approx(-float(expected.logsumexp(-1).sum()), abs=0.4)
    found = elbo.compute_marginals(model, empty, rate)["c"].probs.detach()
    torch.testing.assert_close(found, expected.softmax(-1)[:, 0], atol=0.04, rtol=0)
    with pytest.raises(ValueError, match="of a class that is enumerated in the model"):
        elbo.loss(mixture(one_step, ENUMERATE), empty, rate)
