"""Tweedie's formula: what the score of q(x_t) says of the data, for mixtures known in closed form (004, Eqs. 131-151).

The mean and covariance of x_0 given x_t are computed in numpy from the responsibilities of the parts of the mixture;
the score and its Jacobian are gradients of the log density, by torch.
"""

import numpy as np
import oracles
import pytest
import torch
from cases import Returns

import pyrodiff

T = 5
BETAS = [0.1, 0.35, 0.02, 0.6, 0.25]
CHAINS = {
    "VP": (pyrodiff.BetaSchedule(BETAS), oracles.preserving_steps(BETAS)),
    "VE": (pyrodiff.GeometricSchedule(T, 0.3, 6.0), oracles.exploding_steps(oracles.geometric_sigmas(T, 0.3, 6.0))),
}
PREDICTIONS = ("DataPrediction", "NoisePrediction", "ScorePrediction", "VelocityPrediction")
every_chain = pytest.mark.parametrize("kind", CHAINS)
every_size = pytest.mark.parametrize("D", [1, 3])
EXACT = {"rtol": 1e-9, "atol": 1e-9}


class Mixture:
    """Weights, means and full covariances of three normals, and q(x_t) of one time: all of x_0 and x_t."""

    def __init__(self, kind, t, D):
        random = np.random.default_rng(7)
        self.weights, self.means = np.array([0.2, 0.5, 0.3]), 1.5 * random.standard_normal((3, D)) + 0.4
        roots = random.standard_normal((3, D, D))
        self.covariances = roots @ roots.transpose(0, 2, 1) / 2 + 0.1 * np.eye(D)
        gain, variance = oracles.moments(CHAINS[kind][1])[t]
        self.a, self.b = float(gain), float(variance) ** 0.5
        part = random.integers(3, size=6)
        x_0 = self.means[part] + np.einsum("bij,bj->bi", roots[part], random.standard_normal((6, D))) / 2**0.5
        self.x_t = torch.from_numpy(self.a * x_0 + self.b * random.standard_normal((6, D)))

    def posterior(self):
        """Mean and covariance of x_0 given each x_t, in numpy."""
        D, x_t = self.means.shape[1], self.x_t.numpy()
        means, covariances, log = [], [], []
        for weight, m, S in zip(self.weights, self.means, self.covariances, strict=True):
            C = self.a**2 * S + self.b**2 * np.eye(D)
            off, gain = x_t - self.a * m, self.a * S @ np.linalg.inv(C)
            means.append(m + off @ gain.T)
            covariances.append(S - gain @ C @ gain.T)
            log.append(np.log(weight) - np.linalg.slogdet(C)[1] / 2 - (off @ np.linalg.inv(C) * off).sum(1) / 2)
        log, means = np.stack(log), np.stack(means)
        part = np.exp(log - log.max(0))
        part = part / part.sum(0)
        mean = np.einsum("kb,kbi->bi", part, means)
        second = np.einsum("kb,kij->bij", part, np.stack(covariances)) + np.einsum(
            "kb,kbi,kbj->bij", part, means, means
        )
        return torch.from_numpy(mean), torch.from_numpy(second - np.einsum("bi,bj->bij", mean, mean))

    def log_density(self, x):
        """log q(x_t) of one state, by torch's own laws."""
        eye = torch.eye(len(x), dtype=torch.float64)
        law = torch.distributions.MultivariateNormal(
            self.a * torch.from_numpy(self.means), self.a**2 * torch.from_numpy(self.covariances) + self.b**2 * eye
        )
        return torch.logsumexp(torch.from_numpy(np.log(self.weights)) + law.log_prob(x), 0)

    def score(self, x=None):
        """The gradient of log q(x_t)."""
        return torch.func.vmap(torch.func.grad(self.log_density))(self.x_t if x is None else x)

    def score_jacobian(self):
        return torch.func.vmap(torch.func.jacrev(torch.func.grad(self.log_density)))(self.x_t)

    def targets(self):
        """What each prediction is to be, from the posterior mean alone: all are linear in x_0, given x_t."""
        mean, _ = self.posterior()
        noise = (self.x_t - self.a * mean) / self.b
        return {
            "DataPrediction": mean,
            "NoisePrediction": noise,
            "ScorePrediction": -noise / self.b,
            "VelocityPrediction": self.a * noise - self.b * mean,
        }


def denoiser(name, kind, output):
    return getattr(pyrodiff, name)(Returns(output), pyrodiff.GaussianForward(CHAINS[kind][0]))


@every_chain
@every_size
def test_the_mean_of_the_data_is_told_by_the_score(kind, D):
    """E[x_0 | x_t] = (x_t + b^2 score) / a: Eqs. 131 to 133."""
    for t in range(1, T + 1):
        mixture = Mixture(kind, t, D)
        mean, _ = mixture.posterior()
        torch.testing.assert_close((mixture.x_t + mixture.b**2 * mixture.score()) / mixture.a, mean, **EXACT)
        torch.testing.assert_close(denoiser("ScorePrediction", kind, mixture.score())(mixture.x_t, t), mean, **EXACT)


@every_chain
@every_size
def test_the_covariance_of_the_data_is_told_by_the_jacobian_of_the_score(kind, D):
    """Cov[x_0 | x_t] = b^2 / a^2 (I + b^2 Jacobian); and b^2 / a times the Jacobian of the mean."""
    for t in range(1, T + 1):
        mixture = Mixture(kind, t, D)
        _, covariance = mixture.posterior()
        a, b, eye = mixture.a, mixture.b, torch.eye(D, dtype=torch.float64)
        torch.testing.assert_close(b**2 / a**2 * (eye + b**2 * mixture.score_jacobian()), covariance, **EXACT)
        reads = denoiser("ScorePrediction", kind, lambda x_t, t, mixture=mixture: mixture.score(x_t))
        jacobian = torch.autograd.functional.jacobian(
            lambda x, t=t, reads=reads: reads(x, t).sum(0), mixture.x_t
        ).transpose(0, 1)
        torch.testing.assert_close(b**2 / a * jacobian, covariance, **EXACT)


@every_chain
@pytest.mark.parametrize("name", PREDICTIONS)
def test_each_prediction_is_told_by_each_other(name, kind):
    """Eqs. 115, 133, 149 and 151: the network that returns the conditional mean of its target reads E[x_0 | x_t]."""
    for t in range(1, T + 1):
        mixture = Mixture(kind, t, 3)
        targets, forward = mixture.targets(), pyrodiff.GaussianForward(CHAINS[kind][0])
        x_0 = denoiser(name, kind, targets[name])(mixture.x_t, t)
        torch.testing.assert_close(x_0, targets["DataPrediction"], **EXACT)
        torch.testing.assert_close(forward.noise(mixture.x_t, x_0, t), targets["NoisePrediction"], **EXACT)
        torch.testing.assert_close(forward.score(mixture.x_t, x_0, t), mixture.score(), **EXACT)
        torch.testing.assert_close(forward.velocity(mixture.x_t, x_0, t), targets["VelocityPrediction"], **EXACT)


@every_chain
def test_the_noise_is_minus_the_scaled_score(kind):
    """Eqs. 150 and 151, in the mean given x_t."""
    for t in range(1, T + 1):
        mixture = Mixture(kind, t, 3)
        torch.testing.assert_close(-mixture.b * mixture.score(), mixture.targets()["NoisePrediction"], **EXACT)


def test_the_mean_of_the_reverse_step_is_told_by_the_score():
    """Eqs. 142 and 143: (x_t + beta_t score) / sqrt(1 - beta_t), which is the mean of the exact p(x_{t-1} | x_t)."""
    for t in range(1, T + 1):
        mixture = Mixture("VP", t, 3)
        forward = pyrodiff.GaussianForward(CHAINS["VP"][0])
        reverse = pyrodiff.GaussianReverse(
            forward, pyrodiff.ScorePrediction(Returns(lambda x_t, t, mixture=mixture: mixture.score(x_t)), forward)
        )
        beta = BETAS[t - 1]
        expected = (mixture.x_t + beta * mixture.score()) / (1 - beta) ** 0.5
        torch.testing.assert_close(reverse(mixture.x_t, t).mean, expected, **EXACT)


@every_chain
def test_the_mean_of_the_reverse_step_is_that_of_the_mixture_of_the_step_before(kind):
    """x_{t-1} is a mixture too, whose step to x_t is Gaussian: Tweedie's formula for it has the same score."""
    for t in range(2, T + 1):
        mixture = Mixture(kind, t, 2)
        steps, before = CHAINS[kind][1], Mixture(kind, t - 1, 2)
        gain, variance = steps[t - 1]
        earlier = Mixture(kind, t, 2)
        earlier.means = before.a * mixture.means
        earlier.covariances = before.a**2 * mixture.covariances + before.b**2 * np.eye(2)
        earlier.a, earlier.b = float(gain), float(variance) ** 0.5
        forward = pyrodiff.GaussianForward(CHAINS[kind][0])
        reverse = pyrodiff.GaussianReverse(forward, pyrodiff.ScorePrediction(Returns(mixture.score()), forward))
        torch.testing.assert_close(reverse(mixture.x_t, t).mean, earlier.posterior()[0], **EXACT)
