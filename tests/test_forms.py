"""The bound in all of its forms (Luo 2022): by data, noise, score and SNR; by terms and by paths; at T = 1."""

import math

import numpy as np
import pyro
import pytest
import torch
from cases import DENOISERS, Returns
from exact import far, gaussian_diffusion, repeat
from pyro.infer import Trace_ELBO
from torch.distributions import kl_divergence

import pyrodiff

M, V = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
X_0 = torch.tensor([[1.0, 2.0], [0.0, -1.5], [3.0, -4.0]], dtype=torch.float64)
BETA = np.array([0.1, 0.2, 0.35, 0.5])
SCHEDULE = pyrodiff.BetaSchedule(BETA.tolist())
ALPHA_BAR = np.concatenate([[1.0], np.cumprod(1 - BETA)])


def gives(kind):
    """A network whose estimate of x_0 is a fixed function, said as data, noise, score or velocity."""

    def said(x_t, t):
        signal, noise, x_0 = math.sqrt(ALPHA_BAR[t]), math.sqrt(1 - ALPHA_BAR[t]), estimate(x_t)
        eps = (x_t - signal * x_0) / noise
        return DENOISERS[kind].target(x_0, eps, signal, noise)

    return Returns(said)


def estimate(x_t):
    return 0.8 * x_t.sin() + 0.3


@pytest.mark.parametrize("t", [2, 3, 4])
def test_four_forms_of_one_estimate_and_the_divergence_of_every_parametrisation_agree(t):
    """Luo Eqs. 99, 110, 130 and 148, of one and the same estimate of x_0."""
    eps = torch.randn(X_0.shape, dtype=torch.float64)
    signal, noise, alpha, beta = math.sqrt(ALPHA_BAR[t]), math.sqrt(1 - ALPHA_BAR[t]), 1 - BETA[t - 1], BETA[t - 1]
    x_t = signal * X_0 + noise * eps
    tilde = beta * (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t])
    off = estimate(x_t) - X_0
    eps_hat = (x_t - signal * estimate(x_t)) / noise
    score_hat, score = -eps_hat / noise, -eps / noise
    snr = ALPHA_BAR[t - 1] / (1 - ALPHA_BAR[t - 1]), ALPHA_BAR[t] / (1 - ALPHA_BAR[t])
    forms = {
        "99": ALPHA_BAR[t - 1] * beta**2 / (1 - ALPHA_BAR[t]) ** 2 / (2 * tilde) * off**2,
        "110": (snr[0] - snr[1]) / 2 * off**2,
        "130": beta**2 / (2 * tilde * (1 - ALPHA_BAR[t]) * alpha) * (eps - eps_hat) ** 2,
        "148": beta**2 / (2 * tilde * alpha) * (score_hat - score) ** 2,
    }
    forward = pyrodiff.GaussianForward(SCHEDULE)
    for kind in ("DataPrediction", "NoisePrediction", "ScorePrediction", "VelocityPrediction"):
        denoiser = getattr(pyrodiff, kind)(gives(kind), forward)
        reverse = pyrodiff.GaussianReverse(forward, denoiser, pyrodiff.PosteriorVariance())
        divergence = kl_divergence(forward.posterior(x_t, X_0, t), reverse(x_t, t))
        for form in forms.values():
            torch.testing.assert_close(form.sum(-1), divergence, rtol=1e-10, atol=1e-10)


def test_L_0_and_L_T_are_their_closed_forms():
    """With p(x_0 | x_1) = N(c x_1 + d, s^2) the mean of the squared distance is a bias and a variance."""
    forward, beta, slope, shift, variance = pyrodiff.GaussianForward(SCHEDULE), BETA[0], 0.6, 0.3, 0.4

    class Affine(torch.nn.Module):
        def forward(self, x_t, t):
            mean = slope * x_t + shift
            return pyro.distributions.Normal(mean, math.sqrt(variance)).to_event(1)

    diffusion = pyrodiff.Diffusion(forward, Affine(), (2,))
    x_0 = X_0.numpy()
    bias, spread = slope * math.sqrt(1 - beta) * x_0 + shift - x_0, slope**2 * beta
    expected = (0.5 * math.log(2 * math.pi * variance) + (bias**2 + spread) / (2 * variance)).sum(-1)
    left = ALPHA_BAR[-1]
    prior = (0.5 * (left * x_0**2 - left - math.log(1 - left))).sum(-1)
    draws = pyrodiff.bound(diffusion, X_0.repeat(2000, 1)).reconstruction.reshape(2000, len(X_0))
    assert not far(draws, torch.from_numpy(expected))
    torch.testing.assert_close(pyrodiff.bound(diffusion, X_0).prior, torch.from_numpy(prior), rtol=1e-10, atol=1e-10)


def forward_guide(diffusion):
    """q(x_1:T | x_0) as it runs, x_1 first (Luo Eqs. 38 to 44)."""
    q = diffusion.forward_process

    def guide(x_0):
        with pyro.plate("data", len(x_0), dim=-1):
            x = x_0
            for t in range(1, q.num_steps + 1):
                x = pyro.sample(f"x_{t}", q.transition(x, t))

    return guide


def test_the_path_form_in_either_order_of_the_guide_is_the_sum_of_the_terms():
    """Luo Eqs. 38 to 44 and 48 to 58, of kernels that are not exact, so that the draws do vary."""
    diffusion = gaussian_diffusion(SCHEDULE, M, V, shift=0.3, widen=1.4)
    x_0 = X_0[:1].expand(4000, 2)
    terms = pyrodiff.bound(diffusion, x_0).nats
    number = len(x_0)

    def by_path(guide):
        return repeat(8, lambda: Trace_ELBO().loss(diffusion.model, guide, x_0) / number)

    for guide in (diffusion.guide, forward_guide(diffusion)):
        paths = by_path(guide)
        error = math.sqrt(float(terms.var()) / number + float(paths.var()) / len(paths))
        assert abs(float(paths.mean() - terms.mean())) < 5 * error
        assert error < 0.05


def test_one_step_is_the_elbo_of_an_autoencoder_with_a_fixed_encoder():
    """Luo Eq. 19 at T = 1: the expected log-likelihood less the divergence from the prior, by quadrature."""
    forward, beta = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.6])), 0.6
    decoder = Returns(lambda x_t, t: 1.5 * x_t.sin())
    reverse = pyrodiff.GaussianReverse(
        forward, pyrodiff.DataPrediction(decoder, forward), pyrodiff.FixedVariance([0.2])
    )
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    x = X_0.numpy()[..., None]
    mean = 1.5 * np.sin(math.sqrt(1 - beta) * x + math.sqrt(beta) * nodes)
    likelihood = (-0.5 * math.log(2 * math.pi * 0.2) - (x - mean) ** 2 / 0.4) @ (weights / weights.sum())
    divergence = 0.5 * ((1 - beta) * X_0.numpy() ** 2 + beta - 1 - math.log(beta))
    elbo = torch.from_numpy((likelihood - divergence).sum(-1))
    diffusion = pyrodiff.Diffusion(forward, reverse, (2,))
    many = X_0.repeat(2000, 1)
    assert not far(-pyrodiff.bound(diffusion, many).nats.reshape(2000, len(X_0)), elbo)
    total = repeat(25, lambda: -Trace_ELBO().loss(diffusion.model, diffusion.guide, many[:480]) / 160)
    assert not far(total, elbo.sum())
