"""The pictures: that they show what they say."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.animation import PillowWriter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

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


def test_terms_that_are_rounding_do_not_stretch_the_axis():
    denoising = torch.tensor([1e-14, 2.0, 1.0])[:, None].expand(3, 2)
    bound = pyrodiff.Bound(torch.ones(2), denoising, torch.ones(2), torch.Size((2,)))
    axes = plots.terms(bound)
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == pytest.approx((2e-6, 4.0), rel=1e-6)


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


# Pictures, samples, and states on the way


def drawn(axes):
    return np.asarray(axes.images[0].get_array())


def rendered(figure):
    """The figure as an array of bytes, with shape (height, width, 4)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("shape", [(7, 20, 30), (7, 1, 20, 30), (7, 3, 20, 30)])
def test_pictures_stand_side_by_side_a_pixel_apart(shape):
    x = torch.rand(shape)
    found = drawn(plots.pictures(x, columns=3))
    assert found.shape[:2] == (3 * 21 - 1, 3 * 31 - 1)
    for n in range(7):
        top, left = 21 * (n // 3), 31 * (n % 3)
        picture = x[n].reshape(-1, 20, 30).permute(1, 2, 0).squeeze(-1)
        np.testing.assert_array_equal(found[top : top + 20, left : left + 30], picture.double())
    np.testing.assert_array_equal(found[20], 0.8)
    np.testing.assert_array_equal(found[:, 30], 0.8)
    np.testing.assert_array_equal(found[42:, 31:], 0.8)  # where there is none
    assert drawn(plots.pictures(x[:5])).shape[:2] == (2 * 21 - 1, 3 * 31 - 1)


def test_a_pixel_of_small_pictures_is_a_square():
    x = torch.rand(4, 8, 6)
    found = drawn(plots.pictures(x, columns=2))
    assert found.shape == (65, 49)
    for row in range(4):
        for column in range(4):
            np.testing.assert_array_equal(found[row:32:4, 25 + column :: 4], x[1].double())


def test_pictures_are_drawn_as_light_and_bits_as_ink():
    x = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
    light, ink = (np.asarray(axes.images[0].to_rgba(drawn(axes))) for axes in (plots.pictures(x), plots.bits(x)))
    assert light[0, 0, :3].tolist() == [0, 0, 0]
    assert light[0, -1, :3].tolist() == [1, 1, 1]
    assert ink[0, 0, :3].tolist() == [1, 1, 1]
    assert ink[0, -1, :3].tolist() == [0, 0, 0]
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    inside = rendered(plots.pictures(red).figure)[200:210, 200:210]
    assert (inside == [255, 0, 0, 255]).all()


def test_given_axes_are_drawn_on():
    figure = Figure()
    top, middle, bottom = figure.subplots(3)
    assert plots.pictures(torch.rand(2, 4, 4), top) is top
    assert plots.samples(torch.rand(9, 2), middle) is middle
    assert plots.curves([{"step": 1, "loss": 2.0}], bottom) is bottom


def test_samples_are_drawn_as_what_they_are():
    points = datasets.swiss_roll(50)
    np.testing.assert_array_equal(plots.samples(points).collections[0].get_offsets(), points)
    beats = datasets.heartbeat(9)
    axes = plots.samples(beats)
    np.testing.assert_array_equal(drawn(axes), beats)
    assert axes.images[0].to_rgba(drawn(axes))[0, int(beats[0].argmax()), :3].tolist() == [0, 0, 0]
    x = torch.tensor([[-1.5, -1.0, 0.0], [0.5, 1.0, 3.0]])
    np.testing.assert_array_equal(drawn(plots.samples(x)), [[0, 0, 0.5], [0.75, 1, 1]])
    np.testing.assert_array_equal(drawn(plots.samples(x, limits=(-3, 3)))[1], [3.5 / 6, 4 / 6, 1])
    np.testing.assert_array_equal(drawn(plots.samples(x + 1.5, limits=(0, 2)))[0], [0, 0.25, 0.75])
    k = datasets.digits("test")[:4]
    np.testing.assert_array_equal(
        drawn(plots.samples(pyrodiff.from_levels(k, 17))), drawn(plots.pictures(k / 16)).astype(float)
    )


FORMS = {
    "points": lambda: torch.randn(4, 30, 2),
    "sequences": lambda: torch.bernoulli(torch.full((4, 30, 12), 0.3)),
    "grey": lambda: torch.randn(4, 30, 20, 24),
    "grey with a channel": lambda: torch.randn(4, 30, 1, 20, 24),
    "coloured": lambda: torch.randn(4, 30, 3, 20, 24),
}
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_a_trajectory_has_a_column_for_each_time(form):
    states = FORMS[form]()
    figure = plots.trajectory(states, times=(9, 5, 1, 0), rows=5)
    assert [axes.get_title() for axes in figure.axes] == ["t = 9", "t = 5", "t = 1", "t = 0"]
    for x, axes in zip(states, figure.axes, strict=True):
        if form == "points":
            np.testing.assert_array_equal(axes.collections[0].get_offsets(), x)
            assert axes.get_xlim() == figure.axes[0].get_xlim() == axes.get_ylim()
        elif form == "sequences":
            np.testing.assert_array_equal(drawn(axes), x[:5])
        else:
            expected = ((x[3].double() + 1) / 2).clamp(0, 1).reshape(-1, 20, 24).permute(1, 2, 0).squeeze(-1)
            assert drawn(axes).shape[:2] == (5 * 21 - 1, 24)
            np.testing.assert_array_equal(drawn(axes)[63:83], expected)
    assert rendered(figure).std() > 10


def test_a_trajectory_shows_no_more_rows_than_there_are_and_no_label_runs_into_another():
    assert drawn(plots.trajectory(torch.rand(2, 3, 32, 32), (1, 0)).axes[0]).shape == (3 * 33 - 1, 32)
    assert drawn(plots.trajectory(torch.rand(2, 9, 32, 32), (1, 0)).axes[0]).shape == (6 * 33 - 1, 32)
    assert drawn(plots.trajectory(torch.rand(2, 50, 7), (1, 0)).axes[0]).shape == (24, 7)
    for form, states in FORMS.items():
        figure = plots.trajectory(states().repeat(3, *[1] * (states().dim() - 1)), range(1011, 999, -1))
        rendered(figure)
        boxes = [axes.title.get_window_extent() for axes in figure.axes]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes)), form
        assert all(box.y1 <= figure.bbox.y1 for box in boxes), form
        assert all(axes.bbox.y0 >= 0 for axes in figure.axes), form


def test_the_last_states_say_what_is_black_and_white():
    states = torch.stack([torch.randn(2, 20, 20), torch.rand(2, 20, 20)])
    first = drawn(plots.trajectory(states, (1, 0)).axes[0])
    np.testing.assert_array_equal(first[:20], states[0, 0].double().clamp(0, 1))
    first = drawn(plots.trajectory(states, (1, 0), limits=(-2, 2)).axes[0])
    np.testing.assert_array_equal(first[:20], ((states[0, 0].double() + 2) / 4).clamp(0, 1))


@every_form
def test_an_animation_has_a_frame_for_each_time(form, tmp_path):
    states = FORMS[form]()
    film = plots.animation(states, times=(9, 5, 1, 0), interval=200)
    path = tmp_path / "film.gif"
    film.save(path, PillowWriter(fps=5))
    with Image.open(path) as image:
        lengths = []
        for n in range(image.n_frames):
            image.seek(n)
            lengths.append(image.info["duration"])
    assert lengths[:3] == [200, 200, 200]
    assert sum(lengths[3:]) == 200 + 1000  # in milliseconds: the last stands for a second more
    assert [*film.new_frame_seq()] == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    (axes,) = film._fig.axes
    assert axes.get_title() == "t = 0"
    if form == "points":
        np.testing.assert_array_equal(axes.collections[0].get_offsets(), states[-1])
    else:
        np.testing.assert_array_equal(drawn(axes), drawn(plots.samples(states[-1])))


def test_states_of_a_sampler_are_drawn():
    sampler = pyrodiff.AncestralSampler(roll())
    states = sampler.trajectory(20, times=(6, 3, 0))
    figure = plots.trajectory(states, times=(6, 3, 0))
    np.testing.assert_array_equal(figure.axes[2].collections[0].get_offsets(), states[2])


# Curves


def record(step, **values):
    return {"step": step, "lr": 1e-3, "note": "kept", **values}


def test_the_curves_are_the_loss_its_mean_and_the_bound():
    losses = 3 + torch.rand(200, dtype=torch.float64)
    records = [record(5 * n, loss=float(loss)) for n, loss in enumerate(losses)]
    records[100:100] = [record(500, bound=3.1, bound_se=0.2), {"loss": 9.0}, record(501), record(None, loss=2.0)]
    records += [record(1000, bound=2.5, bound_se=None, loss=None), record(1001, loss=math.nan, bound=math.inf)]
    axes = plots.curves(records)
    thin, smooth, bound = axes.lines[:3]
    np.testing.assert_array_equal(thin.get_xydata(), np.stack([5 * np.arange(200), losses], 1))
    assert thin.get_linewidth() < smooth.get_linewidth()
    expected = [float(losses[max(0, n - 5) : n + 6].mean()) for n in range(200)]
    np.testing.assert_allclose(smooth.get_ydata(), expected)
    np.testing.assert_array_equal(bound.get_xydata(), [[500, 3.1], [1000, 2.5]])
    (bars,) = [container for container in axes.containers if hasattr(container, "has_yerr")]
    segments = bars.lines[2][0].get_segments()
    np.testing.assert_allclose(segments, [[[500, 2.7], [500, 3.5]], [[1000, 2.5], [1000, 2.5]]])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["loss", "loss, mean of 11", "bound, held out ± 2 s.e."]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "nats per datum", "linear")


def test_few_losses_are_not_smoothed_and_either_curve_may_be_missing():
    axes = plots.curves([record(n, loss=1.0 + n) for n in range(9)])
    assert len(axes.lines) == 1
    axes = plots.curves([record(1, bound=2.0)])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bound, held out"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [((100.0, 3.0), "log"), ((89.0, 3.0), "linear"), ((100.0, 0.0), "linear"), ((9.0, -1.0), "linear")],
)
def test_the_axis_is_logarithmic_where_that_shows_more(values, scale):
    assert plots.curves([record(n, loss=value) for n, value in enumerate(values)]).get_yscale() == scale
    assert plots.curves([record(1, loss=values[0]), record(2, bound=values[1])]).get_yscale() == scale
