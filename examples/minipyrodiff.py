r"""The whole idea of pyrodiff on one page, in plain torch and Pyro, as ``minipyro`` is the idea of Pyro.

    python examples/minipyrodiff.py

A fixed chain q turns data x_0 into noise x_T in T steps; a learned chain p_θ turns noise into data. With β_t the
variance of a step and α̅_t = Π_{s≤t} (1 - β_s), so that a_t = √α̅_t is the signal and b_t = √(1 - α̅_t) the noise,

    q(x_t | x_0)           =  N(a_t x_0, b_t²)                   that is, x_t = a_t x_0 + b_t ε with ε ~ N(0, I)
    q(x_{t-1} | x_t, x_0)  =  N(μ_t(x_t, x_0), β_t b_{t-1}² / b_t²)
    μ_t(x_t, x_0)          =  (√(1 - β_t) b_{t-1}² x_t + a_{t-1} β_t x_0) / b_t²

    p(x_T)                 =  N(0, I)
    p_θ(x_{t-1} | x_t)     =  N(μ_t(x_t, x̂_0), β_t)              with x̂_0 = (x_t - b_t ε_θ(x_t, t)) / a_t

where the network ε_θ guesses the noise in x_t. With p_θ(x_0:T) as a Pyro model and q(x_1:T | x_0) as its guide, minus
Pyro's ELBO is, term by term (Luo 2022, Eq. 58, https://arxiv.org/abs/2208.11970),

    -log p_θ(x_0)  ≤    KL(q(x_T | x_0) || p(x_T))                                         L_T, prior
                      + Σ_{t=2}^T E KL(q(x_{t-1} | x_t, x_0) || p_θ(x_{t-1} | x_t))        L_{t-1}, denoising
                      - E log p_θ(x_0 | x_1)                                               L_0, reconstruction

with the means E over x_t ~ q(x_t | x_0). ``main`` trains such a pair on eight Gaussians in the plane, and prints its
bound beside their entropy, which no bound is below in expectation, and the moments of samples beside the data's. Some
20 seconds on one core: expect 1.81 ± 0.03 nats, entropy 1.53. The library is this with checks, speed and options.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

# The noise schedule: β_1, ..., β_T, in float64. In float32, 1 - α̅_1 of Ho's schedule is off in its fourth digit.


def linear_beta(T: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """β_t on a line: by default Ho's (2020), made for T = 1000; with fewer steps each has to be larger."""
    return torch.linspace(first, last, T, dtype=torch.float64)


def cosine_beta(T: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """β_t such that α̅_t is a squared cosine (Nichol and Dhariwal, 2021), capped so that some signal is left."""
    angle = (torch.arange(T + 1, dtype=torch.float64) / T + offset) / (1 + offset) * math.pi / 2
    return (1 - angle[1:].cos() ** 2 / angle[:-1].cos() ** 2).clamp(max=largest)


class Diffusion(nn.Module):
    """The kernels of q and p_θ, and two pairs of Pyro programs made of them. Data have shape (B, D)."""

    def __init__(self, beta: Tensor, network: nn.Module, D: int = 2) -> None:
        super().__init__()
        self.T, self.network = len(beta), network
        self.beta = torch.cat([beta.new_zeros(1), beta])  # tables from t = 0 on: beta[t] is β_t
        self.alpha_bar = (1 - self.beta).cumprod(0)
        self.signal, self.noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()  # a_t, b_t; a_0 = 1 and b_0 = 0
        self.prior = dist.Normal(torch.zeros(D), 1.0).to_event(1)  # p(x_T), which has forgotten the data

    # The kernels: laws of B data of D numbers each. t is an int, or integers of shape (B,), a time for each datum.

    def marginal(self, x_0: Tensor, t: int | Tensor) -> dist.Distribution:
        """q(x_t | x_0): t steps at once, since a sum of Gaussian noises is Gaussian noise."""
        return dist.Normal(column(self.signal[t], x_0) * x_0, column(self.noise[t], x_0)).to_event(1)

    def posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> dist.Distribution:
        """q(x_{t-1} | x_t, x_0), for t > 1: a step back, if the data were known."""
        deviation = self.beta[t].sqrt() * self.noise[t - 1] / self.noise[t]  # 0 at t = 1, where all is known
        return dist.Normal(self.mean(x_t, x_0, t), column(deviation, x_t)).to_event(1)

    def reverse(self, x_t: Tensor, t: int | Tensor) -> dist.Distribution:
        """p_θ(x_{t-1} | x_t): the same step with the data guessed. Any variance is allowed; β_t is a good one."""
        x_0 = (x_t - column(self.noise[t], x_t) * self.network(x_t, t)) / column(self.signal[t], x_t)
        return dist.Normal(self.mean(x_t, x_0, t), column(self.beta[t].sqrt(), x_t)).to_event(1)

    def mean(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> Tensor:
        """μ_t(x_t, x_0), by Bayes' rule; at t = 1 it is x_0."""
        weight_t = (1 - self.beta[t]).sqrt() * self.noise[t - 1] ** 2 / self.noise[t] ** 2
        weight_0 = self.signal[t - 1] * self.beta[t] / self.noise[t] ** 2
        return column(weight_t, x_t) * x_t + column(weight_0, x_t) * x_0

    # The trajectory pair: a site for each state. The guide goes down from x_T as the model does, not up as the noise
    # comes in: so both laws at the site x_{t-1} are given the same x_t, and their KL is a draw of L_{t-1}.

    def model(self, x_0: Tensor | None = None, num_samples: int = 1) -> Tensor:
        """p_θ(x_0:T): scores data, if they are given; otherwise running it samples (ancestral sampling)."""
        pyro.module("network", self.network)
        with pyro.plate("data", num_samples if x_0 is None else len(x_0)):
            x = pyro.sample(f"x_{self.T}", self.prior)
            for t in range(self.T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", self.reverse(x, t))
            return pyro.sample("x_0", self.reverse(x, 1), obs=x_0)

    def guide(self, x_0: Tensor) -> None:
        """q(x_1:T | x_0), in which nothing is learned."""
        with pyro.plate("data", len(x_0)):
            x = pyro.sample(f"x_{self.T}", self.marginal(x_0, self.T))
            for t in range(self.T, 1, -1):
                x = pyro.sample(f"x_{t - 1}", self.posterior(x, x_0, t))

    # The one-step pair, to train with: the bound is a sum over t, and one of its terms, at a random t and divided by
    # p(t) = 1 / T, has the same mean. That is one call of the network, whatever T. Both programs draw t and x_t by the
    # same law, which adds no KL; of x_s with s = t - 1 and x_0, only the one that t calls for is scored.

    def one_step_model(self, x_0: Tensor) -> None:
        """p(x_T), and p_θ(x_{t-1} | x_t) at one t for each datum."""
        pyro.module("network", self.network)
        t = draw_times(len(x_0), self.T)
        with pyro.plate("data", len(x_0)):
            pyro.sample("x_T", self.prior)
            x_t = pyro.sample("x_t", self.marginal(x_0, t))
            kernel = self.reverse(x_t, t)
            with poutine.scale(scale=self.T), poutine.mask(mask=t > 1):
                pyro.sample("x_s", kernel)
            with poutine.scale(scale=self.T), poutine.mask(mask=t == 1):
                pyro.sample("x_0", kernel, obs=x_0)

    def one_step_guide(self, x_0: Tensor) -> None:
        """q(x_T | x_0), and q(x_{t-1} | x_t, x_0) at one t for each datum."""
        t = draw_times(len(x_0), self.T)
        with pyro.plate("data", len(x_0)):
            pyro.sample("x_T", self.marginal(x_0, self.T))
            x_t = pyro.sample("x_t", self.marginal(x_0, t))
            with poutine.scale(scale=self.T), poutine.mask(mask=t > 1):
                pyro.sample("x_s", self.posterior(x_t, x_0, t.clamp(min=2)))  # any law will do at t = 1

    def bound(self, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """L_T (B,), L_1, ..., L_{T-1} (T - 1, B) and L_0 (B,) in nats: what TraceMeanField_ELBO adds up."""
        guide = poutine.trace(self.guide).get_trace(x_0)
        model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(x_0)  # the model at the guide's draws
        q, p = ({name: site["fn"] for name, site in trace.nodes.items() if "fn" in site} for trace in (guide, model))
        kl = torch.stack([kl_divergence(q[f"x_{s}"], p[f"x_{s}"]) for s in range(1, self.T + 1)])
        return kl[-1], kl[:-1], -p["x_0"].log_prob(x_0)


def draw_times(B: int, T: int) -> Tensor:
    """A time in 1, ..., T for each datum: each is uniform, and together, from one u, they are evenly spread."""
    u = pyro.sample("u", dist.Uniform(0.0, 1.0))
    return ((u + torch.arange(B) / B) % 1 * T).long().clamp(max=T - 1) + 1


def column(values: Tensor, x: Tensor) -> Tensor:
    """Numbers of shape () or (B,) as a column beside x of shape (B, D), and only now in its dtype."""
    return values.to(x).reshape(-1, 1)


class MLP(nn.Module):
    """ε_θ(x_t, t), large enough for the plane; t is embedded by sines and cosines."""

    def __init__(self, T: int, hidden: int = 64) -> None:
        super().__init__()
        self.frequencies = math.pi / T * torch.tensor([1.0, 2.0, 4.0, 8.0])
        hiddens = [nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.layers = nn.Sequential(nn.Linear(2 + 8, hidden), *hiddens, nn.Linear(hidden, 2))

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        angles = (column(torch.as_tensor(t), x_t) * self.frequencies).expand(len(x_t), -1)
        return self.layers(torch.cat([x_t, angles.sin(), angles.cos()], -1))


def main(num_steps: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    """Train, print the bound and the moments of samples; returns the bound's terms."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    angle = torch.arange(8) * math.pi / 4
    centres = 1.4 * torch.stack([angle.cos(), angle.sin()], -1)  # of weights 1 : 2 : ... : 8, and of variance about 1
    data = dist.MixtureSameFamily(dist.Categorical(torch.arange(1.0, 9.0)), dist.Normal(centres, 0.2).to_event(1))

    diffusion, elbo = Diffusion(linear_beta(50, first=0.002, last=0.3), MLP(50)), TraceMeanField_ELBO()
    pair = diffusion.one_step_model, diffusion.one_step_guide
    svi = SVI(*pair, pyro.optim.ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / num_steps)}), elbo)  # lr falls to 1e-4
    for _ in range(num_steps):
        svi.step(data.sample((512,)))

    x_0 = data.sample((10000,))
    with torch.no_grad():
        prior, denoising, reconstruction = diffusion.bound(x_0)
        again = torch.tensor([elbo.loss(*pair, x_0) / len(x_0) for _ in range(100)])
        samples = diffusion.model(num_samples=len(x_0))
    rows = {"L_T      prior": prior, "ΣL_{t-1} denoising": denoising.sum(0), "L_0      reconstruction": reconstruction}
    rows |= {"bound": sum(rows.values()), "bound, by the one-step pair": again, "entropy": -data.log_prob(x_0)}
    for name, nats in rows.items():
        print(f"{name:28}{float(nats.mean()):8.4f} ± {float(nats.std()) / len(nats) ** 0.5:.4f} nats")
    print("         mean        deviation   share of each Gaussian")
    for name, x in ("data", x_0), ("samples", samples):
        shares = torch.cdist(x, centres).argmin(1).bincount(minlength=8) / len(x)
        print(f"{name:7}" + "".join(f"{value:6.2f}" for value in torch.cat([x.mean(0), x.std(0), shares]).tolist()))
    return prior, denoising, reconstruction


if __name__ == "__main__":
    main()
