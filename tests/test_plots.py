"""The pictures: that they show what they say."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pyrodiff
from pyrodiff import datasets, networks, plots


def roll():
    forward = pyrodiff.GaussianForward(pyrodiff.CosineSchedule(num_steps=6))
    denoiser = pyrodiff.VelocityPrediction(networks.MLP(event_shape=(2,), hidden=16), forward)
    return pyrodiff.Diffusion(forward, pyrodiff.GaussianReverse(forward, denoiser), event_shape=(2,))


def test_the_diffusion_process_shows_data_samples_and_drift(tmp_path):
    x_0 = datasets.swiss_roll(100)
    figure = plots.diffusion_process(roll(), x_0, times=(0, 3, 6))
    axes = np.array(figure.axes).reshape(3, 3)
    np.testing.assert_array_equal(axes[0, 0].collections[0].get_offsets(), x_0.numpy())
    assert all(len(ax.collections[0].get_offsets()) == 100 for ax in axes[:2].flat)
    figure.savefig(tmp_path / "figure.png")


def test_the_drift_is_the_mean_of_the_kernel_less_the_state():
    diffusion = roll()
    torch.nn.init.normal_(diffusion.reverse.denoiser.network.outlet.weight)
    axes = plots.diffusion_process(diffusion, datasets.swiss_roll(10), times=(3,)).axes
    (arrows,) = axes[2].collections
    grid = torch.tensor(arrows.XY, dtype=torch.float32)
    with torch.no_grad():
        drift = diffusion.reverse(grid, 3).mean - grid
    drawn = torch.stack([torch.as_tensor(arrows.U), torch.as_tensor(arrows.V)], -1).float()
    ratio = (drawn / drift).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand(len(ratio)), rtol=1e-2, atol=0)
    assert ratio[0] > 0


def test_the_terms_are_the_means_of_the_bound():
    bound = pyrodiff.bound(roll(), datasets.swiss_roll(20))
    (line,) = plots.terms(bound).lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(2, 7))
    np.testing.assert_array_equal(line.get_ydata(), bound.denoising.mean(1).numpy())


def test_bits_are_drawn_as_they_are():
    sequences = datasets.heartbeat(7)
    np.testing.assert_array_equal(plots.bits(sequences).images[0].get_array(), sequences.numpy())
    pictures = datasets.digits("test", binary=True)[:5]
    drawn = plots.bits(pictures, Figure().subplots(), columns=2).images[0].get_array()
    assert drawn.shape == (3 * 9 - 1, 2 * 9 - 1)
    np.testing.assert_array_equal(drawn[9:17, 9:17], pictures[3].numpy())


def test_what_cannot_be_drawn_is_refused_by_name():
    with pytest.raises(ValueError, match=r"x must have shape .* \(3,\)"):
        plots.bits(torch.zeros(3))
    with pytest.raises(ValueError, match=r"times must be ints in 0..6, but they are \(7,\)"):
        plots.diffusion_process(roll(), datasets.swiss_roll(5), times=(7,))
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(num_steps=3))
    denoiser = pyrodiff.LogitPrediction(networks.MLP(event_shape=(4,), hidden=16), forward)
    bits = pyrodiff.Diffusion(forward, pyrodiff.BinomialReverse(forward, denoiser), event_shape=(4,))
    with pytest.raises(ValueError, match=r"diffusion must have event_shape \(2,\), but it is \(4,\)"):
        plots.diffusion_process(bits, datasets.swiss_roll(5))


def test_the_variances_are_drawn_as_they_are_accounted():
    diffusion, x_0 = roll(), datasets.swiss_roll(100)
    account = pyrodiff.variance_account(diffusion, x_0, num_particles=5, num_pairs=3, batch_size=8)
    over_time, bars = plots.variances(account).axes
    np.testing.assert_allclose(over_time.lines[0].get_ydata(), account.second_moment.sqrt())
    np.testing.assert_allclose(over_time.lines[1].get_ydata(), account.mean.abs())
    first = account.value["uniform"][0], account.gradient["uniform"][0]
    for container, found, reference in zip(
        [bars.containers[1], bars.containers[3]], (account.value, account.gradient), first, strict=True
    ):
        widths = [patch.get_width() for patch in container]
        np.testing.assert_allclose(widths, [variance / reference for variance, _ in found.values()])
    assert [label.get_text() for label in bars.get_yticklabels()] == list(account.drawings)
