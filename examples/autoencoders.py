"""A VAE of pictures as bits, its prior N(0, I) or a diffusion, for ``latent_diffusion.py``; nothing to run here."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import trange

import pyrodiff
from pyrodiff import networks

SIZE, T = 8, 100  # of a latent; steps of the prior's chain


def latent_prior() -> pyrodiff.Diffusion:
    """A diffusion of latents. Its output layer starts at 0, where it is nearly N(0, I)."""
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(T))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP((SIZE,), hidden=128, num_blocks=2, frequency=1.0), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(SIZE,))


class VAE(nn.Module):
    """z ~ prior, x ~ decoder(z), pictures as bits; and the encoder q(z | x).

    Arguments:
        shape: The shape of a picture.
        hidden: The hidden units of encoder and decoder.
        prior: A diffusion of z; N(0, I) if not given.
    """

    def __init__(self, shape: torch.Size, hidden: int, prior: pyrodiff.Diffusion | None = None) -> None:
        super().__init__()
        n = shape.numel()
        self.encoder, self.decoder = _network(n, 2 * SIZE, hidden), _network(SIZE, n, hidden)
        self.prior, self.shape = prior, shape

    def encoded(self, x: Tensor) -> dist.Independent:
        loc, log_scale = self.encoder(2 * x.flatten(1) - 1).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def decoded(self, z: Tensor) -> dist.Independent:
        logits = self.decoder(z).unflatten(-1, self.shape)
        return dist.Bernoulli(logits=logits).to_event(len(self.shape))

    def latent(self) -> dist.TorchDistribution:
        normal = dist.Normal(torch.zeros(SIZE), 1.0).to_event(1)
        return normal if self.prior is None else pyrodiff.DiffusionDistribution(self.prior)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.latent())
            pyro.sample("x", self.decoded(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoded(x))


def _network(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)]
    return nn.Sequential(*layers)


def fit(vae: VAE, grey: Tensor, num_steps: int, name: str, batch_size: int = 128) -> VAE:
    """Train all of it together, by SVI on freshly drawn bits; the brightness of a pixel is its probability of a 1."""
    svi = pyrodiff.SVI(
        vae.model,
        vae.guide,
        lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        pyrodiff.DiffusionELBO(),
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, num_steps),
        compile=num_steps >= 1000,  # half the time, after ten seconds
    )
    with trange(num_steps, desc=name, unit="step", mininterval=0.5) as bar:
        for step in bar:
            loss = svi.step(torch.bernoulli(grey[torch.randint(len(grey), (batch_size,))])) / batch_size
            if step % 50 == 49:
                bar.set_postfix_str(f"{float(loss):.2f} nats")
    return vae.eval()
