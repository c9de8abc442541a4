"""Samples of a datum given a part of it: the known numbers stay, and the numbers printed are the library's."""

import math
import re

import numpy as np
import pytest
import torch
from commands import call, points, saved, train, without_pictures
from PIL import Image

import pyrodiff
from pyrodiff.base.randomness import kept_sources
from pyrodiff.command.runs import Run

BITS = np.random.default_rng(3).random((40, 6)) < 0.3
LEVELS = np.random.default_rng(1).integers(0, 6, (40, 4, 4)).astype(np.uint8)

pytestmark = pytest.mark.filterwarnings("ignore:the effective sample size collapsed")  # of networks not trained


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_pictures(monkeypatch.setattr)
    with kept_sources():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of points, of bits and of small pictures, and for each a datum and a mask."""
    home = tmp_path_factory.mktemp("home")
    with kept_sources(), pytest.MonkeyPatch.context() as patch:
        without_pictures(patch.setattr)
        for name, x, options in (
            ("points", points(), {}),
            ("bits", BITS, {}),
            ("levels", LEVELS, {"levels": 6, "channels": (8, 8)}),
        ):
            assert train(saved(home / f"{name}.npy", x), home / name, **options).code == 0
            saved(home / f"{name}-one.npy", x[0])
            mask = np.zeros(x.shape[1:], bool)
            mask.flat[0] = True
            saved(home / f"{name}-mask.npy", mask)
    return home


def drawn(home, name, *more):
    line = ["sample", home / name, "--given", home / f"{name}-one.npy", "--mask", home / f"{name}-mask.npy"]
    done = call(*line, "--number=5", "--particles=8", "--save", home / "s.npz", *more)
    assert done.code == 0, done
    with np.load(home / "s.npz") as file:
        return done, file["samples"]


@pytest.mark.parametrize("name", ["bits", "levels"])
@pytest.mark.parametrize("more", [[], ["--replacement"]])
def test_what_is_known_exactly_stays(home, name, more):
    done, samples = drawn(home, name, *more)
    one = np.load(home / f"{name}-one.npy")
    assert samples.shape == (5, *one.shape)
    assert (samples.reshape(5, -1)[:, 0] == one.flat[0]).all()
    assert ("-log p of what is known" in done.out) == (not more)


def test_the_evidence_is_that_of_the_density_in_the_units_given(home):
    done, samples = drawn(home, "points", "--noise=0.1")
    run = Run.opened(home / "points")
    one = torch.from_numpy(np.load(home / "points-one.npy"))
    mask = torch.tensor([True, False])
    part = pyrodiff.Inpainting(mask, run.form.encoded(one[None])[0], noise=0.1)
    found = pyrodiff.posterior(run.diffusion, part, num_particles=8, generator=0)
    expected = float(run.form.scale[0].log()) - float(found.log_evidence)
    printed = float(re.search(r"-log p of what is known: (\S+)", done.out)[1])
    assert printed == pytest.approx(expected, abs=0.05)
    assert samples.dtype == np.float64
    np.testing.assert_allclose(samples, run.form.decoded(found.draw(5, generator=0)).numpy(), rtol=1e-5)


def test_the_evidence_is_what_samples_of_the_model_alone_have(tmp_path):
    """Of a network that was trained little, whose Jacobian is poor: the twist must not lean on it."""
    line = [
        "train",
        "swiss-roll",
        "--out",
        tmp_path / "run",
        "--train-steps=60",
        "--T=20",
        "--hidden=64",
        "--samples=4",
    ]
    assert call(*line, "--evaluate-every=60", "--evaluate-on=8", "--final-times=1").code == 0
    run = Run.opened(tmp_path / "run")
    x = pyrodiff.AncestralSampler(run.diffusion)(num_samples=4000, generator=0)
    noise, known, scale = 0.1, torch.tensor(0.8), run.form.scale[0]
    density = torch.distributions.Normal(run.form.decoded(x)[:, 0], noise * scale).log_prob(known).exp()
    expected, error = float(-density.mean().log()), float(density.std() / density.mean()) / 4000**0.5
    one, mask = saved(tmp_path / "one.npy", np.float32([0.8, 0])), saved(tmp_path / "mask.npy", np.array([True, False]))
    done = call(
        *("sample", tmp_path / "run", "--given", one, "--mask", mask, f"--noise={noise}", "--particles=1024"),
        *("--save", tmp_path / "s.npz"),
    )
    printed, spread = map(float, re.search(r"of what is known: (\S+) ± (\S+)", done.out).groups())
    assert abs(printed - expected) < 5 * math.hypot(spread, error)
    assert spread < 0.1


def test_a_mask_and_a_datum_that_are_pictures(home, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4)).astype(np.uint8)
    assert train(saved(tmp_path / "x.npy", x), tmp_path / "run", channels=(8, 8)).code == 0
    mask = np.zeros((4, 4), np.uint8)
    mask[:2] = 255
    for name, picture in (("one", x[0]), ("mask", mask)):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    line = ["sample", tmp_path / "run", "--given", tmp_path / "one.png", "--mask", tmp_path / "mask.png"]
    assert call(*line, "--number=3", "--particles=4", "--save", tmp_path / "s.npz").code == 0
    with np.load(tmp_path / "s.npz") as file:
        assert (file["samples"][:, :2] == x[0, :2]).all()


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("points", [], ["--noise", "above 0"]),
        ("bits", ["--sampler=ddim"], ["--sampler"]),
        ("bits", ["--sample-steps=3"], ["--sample-steps"]),
        ("bits", ["--trajectory=strip"], ["--trajectory"]),
        ("bits", ["--mask={home}/points-mask.npy"], ["--mask", "shape"]),
        ("bits", ["--given={home}/points-one.npy"], ["--given", "shape"]),
        ("bits", ["--given={home}/nothing.npy"], ["--given", "nothing.npy"]),
        ("bits", ["--mask={home}/ones.npy"], ["--mask", "some"]),
        ("bits", ["--given={home}/twos.npy"], ["--given", "0..1"]),
        ("bits", ["--particles=7"], ["--particles", "islands"]),
        ("bits", ["--noise=-1"], ["--noise"]),
        ("bits", ["--noise=0.1"], ["--noise", "left out for bits"]),
        ("bits", ["--label=0"], ["--label", "without labels"]),
        ("bits", ["--mask={home}/halves.npy"], ["--mask", "zeros and ones"]),
        ("bits", ["--mask={home}/nans.npy"], ["--mask", "zeros and ones"]),
        ("points", ["--given={home}/large.npy", "--noise=1"], ["--given", "below 1e30"]),
        ("levels", ["--given={home}/white.npy"], ["--given", "0..5", "float64 in 0..1"]),
        ("levels", ["--given={home}/true.npy"], ["--given", "0..5", "bool in 0..1"]),
    ],
)
def test_what_cannot_be_given(home, name, more, words):
    saved(home / "ones.npy", np.ones(6, bool))
    saved(home / "halves.npy", np.array([0.5, 0, 0, 0, 0, 0]))
    saved(home / "nans.npy", np.array([np.nan, 1, 0, 0, 0, 0]))
    saved(home / "large.npy", np.array([1e300, 0.0]))
    saved(home / "white.npy", np.ones((4, 4)))  # where the darkest but one is 1
    saved(home / "true.npy", np.ones((4, 4), bool))
    saved(home / "twos.npy", np.full(6, 2))
    line = ["sample", home / name, "--given", home / f"{name}-one.npy", "--mask", home / f"{name}-mask.npy"]
    before = {path for path in home.rglob("*")}
    assert call(*line, *(word.format(home=home) for word in more)).is_refused(*words)
    assert {path for path in home.rglob("*")} == before


def test_one_mask_for_all_channels(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 4)).astype(np.uint8)
    assert train(saved(tmp_path / "x.npy", x), tmp_path / "run", network="mlp").code == 0
    mask, samples = np.arange(16).reshape(4, 4) < 5, {}
    for name, one in {"grey": mask, "colour": np.stack([mask] * 3)}.items():
        line = ["--given", saved(tmp_path / "one.npy", x[0]), "--mask", saved(tmp_path / "mask.npy", one)]
        done = call("sample", tmp_path / "run", *line, "--number=3", "--particles=4", "--save", tmp_path / "s.npz")
        assert done.code == 0, done
        with np.load(tmp_path / "s.npz") as file:
            samples[name] = file["samples"]
    assert (samples["grey"] == samples["colour"]).all()
    assert (samples["grey"][:, :, mask] == x[0][:, mask]).all()


@pytest.mark.parametrize("option", ["--noise=0.1", "--replacement"])
def test_what_would_be_heeded_with_a_datum_alone(home, option):
    assert call("sample", home / "bits", option).is_refused("--given", option.split("=")[0])


@pytest.mark.parametrize("option", ["--given", "--mask"])
def test_one_without_the_other(home, option):
    file = {"--given": "bits-one.npy", "--mask": "bits-mask.npy"}[option]
    other = {"--given": "--mask", "--mask": "--given"}[option]
    assert call("sample", home / "bits", option, home / file).is_refused(other, "must be given")


def test_samples_of_one_label(tmp_path):
    np.savez(tmp_path / "x.npz", x=points(), y=np.arange(40) % 3)
    assert train(tmp_path / "x.npz", tmp_path / "run", labels=True).code == 0
    line = ["sample", tmp_path / "run", "--number=4"]
    assert call(*line, "--label=3").is_refused("--label", "below 3")
    assert call(*line, "--label=2", "--save", tmp_path / "s.npz").code == 0
    run = Run.opened(tmp_path / "run")
    draw = pyrodiff.AncestralSampler(run.diffusion)
    expected = draw(4, torch.full((4,), 2), generator=torch.Generator().manual_seed(0))
    with np.load(tmp_path / "s.npz") as file:
        np.testing.assert_allclose(file["samples"], run.form.decoded(expected).numpy(), rtol=1e-5)
