"""From options to data and a model: what is read is what is modelled, in its own units, and no option does nothing."""

import gzip
import itertools
import math

import numpy as np
import pytest
import torch
from commands import TINY, blank, call, notes, points, same, saved, train, with_pictures, without_pictures, words
from matplotlib.figure import Figure

import pyrodiff
from pyrodiff import checkpoints, datasets
from pyrodiff.base.randomness import kept_sources
from pyrodiff.command import models, options, plans, runs
from pyrodiff.command import train as training
from pyrodiff.command.data import Form
from pyrodiff.command.options import Plan, flag
from pyrodiff.command.plans import prepare
from pyrodiff.command.runs import Run
from pyrodiff.command.stopping import Stop
from pyrodiff.command.train import Trainer
from pyrodiff.running import threads as measuring

pytestmark = pytest.mark.filterwarnings("ignore:the data have mean")  # of few levels in a corner of 256

CPU = torch.device("cpu")
FLOATS = points()
LEVELS = np.random.default_rng(1).integers(0, 6, (40, 4, 4)).astype(np.uint8)
PICTURES = np.random.default_rng(2).integers(0, 256, (40, 3, 4, 4)).astype(np.uint8)
BITS = np.random.default_rng(3).random((40, 6)) < 0.3


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_pictures(monkeypatch.setattr)
    with kept_sources():
        yield


@pytest.fixture
def made(tmp_path):
    """What makes a file of an array, and gives its path."""
    counted = itertools.count()
    return lambda x: str(saved(tmp_path / f"{next(counted)}.npy", x))


def prepared(data, **options):
    return prepare({"data": str(data), **TINY, **options}, CPU)


def begun(data, folder, **options):
    plan, data = prepared(data, **options)
    often = data.often() if plan.model.prediction == "level" else None
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, plan, data.form, CPU, often), data


# Form


@pytest.mark.parametrize(
    ("form", "raw"),
    [
        (Form("numbers", torch.Size([2]), shift=torch.tensor([1.0, -3.0]), scale=torch.tensor([2.0, 0.25])), FLOATS),
        (Form("levels", torch.Size([4, 4]), 6), LEVELS),
        (Form("levels", torch.Size([3, 4, 4]), 256), PICTURES),
        (Form("levels", torch.Size([3]), 1000), np.random.default_rng(0).integers(0, 1000, (20, 3))),
        (Form("bits", torch.Size([6]), rate=0.3), BITS),
    ],
)
def test_what_is_encoded_is_decoded(form, raw):
    raw = torch.from_numpy(raw)
    again = form.decoded(form.encoded(raw))
    if form.read_as == "numbers":
        torch.testing.assert_close(again.double(), raw.double(), rtol=1e-6, atol=1e-6)
        expected = (raw - torch.tensor([1.0, -3.0])) / torch.tensor([2.0, 0.25])
        torch.testing.assert_close(form.encoded(raw).double(), expected.double(), rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(again.long(), raw.long())
        assert not again.is_floating_point()
    assert same(vars(Form.of(form.plain())), vars(form))


def test_numbers_keep_their_digits(tmp_path):
    """Numbers of float64 that differ by little beside what they are."""
    x = points() + 1e9
    _, data = prepared(saved(tmp_path / "x.npy", x))
    raw = torch.cat([part[:] for part in data.parts.values()])
    again = data.form.decoded(data.form.encoded(raw)).double()
    assert float((again - raw).abs().max()) < 1e-5


def test_numbers_have_mean_0_and_variance_1_inside(made):
    _, data = prepared(made(FLOATS))
    x_0 = data.split("train")
    torch.testing.assert_close(x_0.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(x_0.std(0), torch.ones(2), atol=1e-5, rtol=0)
    assert data.form.log_scale == pytest.approx(float(data.parts["train"][:].double().std(0).log().sum()))


# The density is one in the units of the data


@pytest.fixture(scope="module")
def as_given(tmp_path_factory):
    """A run of the data as they are."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, kept_sources():
        without_pictures(patch.setattr)
        assert train(saved(home / "x.npy", FLOATS), home / "run").code == 0
    return home / "run"


@pytest.mark.parametrize("factor", [8.0, 2.0**-70, 10.0])
def test_the_bound_is_of_the_density_in_the_units_given(as_given, tmp_path, factor):
    """-log p of a times as large data is log a a dimension more; to the last bit inside, if a is a power of two."""
    assert train(saved(tmp_path / "x.npy", FLOATS * factor), tmp_path / "run").code == 0
    first, second = (pyrodiff.Bound.load(folder / "bound.npz") for folder in (as_given, tmp_path / "run"))
    shift = 2 * math.log(factor)
    rounding = {"rtol": 0, "atol": 1e-4 if factor == 10 else 1e-5 * max(1, abs(shift))}
    torch.testing.assert_close(second.nats - first.nats, torch.full_like(first.nats, shift), **rounding)
    bits = torch.full_like(first.nats, math.log2(factor))
    torch.testing.assert_close(second.bits_per_dim - first.bits_per_dim, bits, **rounding)
    ours, theirs = notes(as_given), notes(tmp_path / "run")
    for a, b in zip(ours, theirs, strict=True):
        for name in {"loss", "bound"} & a.keys():
            assert b[name] - a[name] == pytest.approx(shift, abs=1e-3)
    with np.load(as_given / "samples.npz") as a, np.load(tmp_path / "run" / "samples.npz") as b:
        assert b["samples"] / factor == pytest.approx(a["samples"], rel=1e-4)


def test_the_bound_of_a_shifted_density_stays(as_given, tmp_path):
    assert train(saved(tmp_path / "x.npy", FLOATS + 64.0), tmp_path / "run").code == 0
    first, second = (pyrodiff.Bound.load(folder / "bound.npz").nats for folder in (as_given, tmp_path / "run"))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-4)


# Splits


@pytest.mark.parametrize("size", [10, 11, 40, 101])
@pytest.mark.parametrize("holdout", [0.01, 0.1, 0.3, 0.45])
def test_splits_are_parts_of_the_data_and_always_the_same(made, size, holdout):
    path = made(np.arange(size) + np.array(0.5))
    if size - 2 * round(holdout * size) < 5:
        with pytest.raises(ValueError, match="holdout must"):
            prepared(path, holdout=holdout, read_as="numbers")
        return
    (_, data), (_, again) = (prepared(path, holdout=holdout, seed=seed, read_as="numbers") for seed in (0, 7))
    parts = [data.parts["train"][:], data.parts["validation"][:], data.parts["test"][:]]
    assert same(parts, [again.parts["train"][:], again.parts["validation"][:], again.parts["test"][:]])
    assert sorted(torch.cat(parts).flatten().tolist()) == [i + 0.5 for i in range(size)]
    assert len(parts[1]) == len(parts[2]) == max(1, round(holdout * size))
    if size > 20:
        assert not parts[0].flatten().diff().eq(1).all(), "in the order they were in"


@pytest.mark.parametrize(("size", "holdout"), [(40, 0.49), (11, 0.49), (10, 0.49), (1000, 0.4999)])
def test_a_holdout_that_leaves_too_little_to_learn_from(made, tmp_path, size, holdout):
    path = made(np.random.default_rng(0).normal(size=(size, 2)))
    done = train(path, tmp_path / "run", holdout=holdout)
    if done.code == 0:
        _, data = prepared(path, holdout=holdout)
        assert len(data.parts["train"][:]) >= 2
    else:
        assert done.is_refused("--holdout")
        assert not (tmp_path / "run").exists()


# Files


def idx(path, x, zipped=False):
    header = bytes([0, 0, 8, x.ndim]) + b"".join(size.to_bytes(4, "big") for size in x.shape)
    path.write_bytes(gzip.compress(header + x.tobytes()) if zipped else header + x.tobytes())


def idx_folder(folder, train=30, test=8, labels=True):
    folder.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (train + test, 4, 4)).astype(np.uint8)
    for name, part in (("train", x[:train]), ("t10k", x[train:])):
        idx(folder / f"{name}-images-idx3-ubyte{'.gz' * (name == 't10k')}", part, name == "t10k")
        if labels:
            idx(folder / f"{name}-labels-idx1-ubyte", np.zeros(len(part), np.uint8))
    return x


def test_a_folder_of_idx_files(tmp_path):
    x = torch.from_numpy(idx_folder(tmp_path / "idx"))
    plan, data = prepared(tmp_path / "idx", holdout=0.2)
    assert (plan.reading.read_as, plan.reading.levels, plan.model.network) == ("levels", 256, "unet")
    assert same(
        [data.parts["train"][:], data.parts["validation"][:], data.parts["test"][:]], [x[:24], x[24:30], x[30:]]
    )
    torch.testing.assert_close(data.split("test"), pyrodiff.from_levels(x[30:], 256))
    assert train(tmp_path / "idx", tmp_path / "run", channels=(8, 8)).code == 0


@pytest.mark.parametrize(("size", "test"), [(1, 8), (2, 8), (30, 1)])
def test_idx_files_of_few_pictures(tmp_path, size, test):
    idx_folder(tmp_path / "idx", size, test)
    done = train(tmp_path / "idx", tmp_path / "run", channels=(8, 8))
    if done.code != 0:
        assert done.is_refused("data")
        assert not (tmp_path / "run").exists()


def test_a_folder_of_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for i, x in enumerate(PICTURES):
        image.fromarray(np.moveaxis(x, 0, -1)).save(tmp_path / "pictures" / ("sub" * (i % 2)) / f"{i:02}.png")
    plan, data = prepared(tmp_path / "pictures")
    assert (plan.reading.read_as, plan.reading.levels, plan.model.network) == ("levels", 256, "unet")
    ours = sorted(map(bytes, torch.cat([part[:] for part in data.parts.values()]).numpy()))
    assert ours == sorted(map(bytes, PICTURES))


def test_an_array_of_several(tmp_path):
    np.savez(tmp_path / "x.npz", a=FLOATS, b=BITS)
    assert prepared(tmp_path / "x.npz", array="a")[1].form.read_as == "numbers"
    assert prepared(tmp_path / "x.npz", array="b")[1].form.read_as == "bits"
    for which in ({}, {"array": "c"}):
        done = train(tmp_path / "x.npz", tmp_path / "run", **which)
        assert done.is_refused("'a' (40, 2) float64", "'b' (40, 6) bool")
    np.savez(tmp_path / "one.npz", FLOATS)
    assert prepared(tmp_path / "one.npz")[1].form.event_shape == (2,)


@pytest.mark.parametrize(
    ("x", "options", "read_as", "levels"),
    [
        (FLOATS, {}, "numbers", None),
        (FLOATS[:, 0], {}, "numbers", None),
        (FLOATS.astype(np.float16), {}, "numbers", None),
        (FLOATS.reshape(10, 2, 2, 2), {}, "numbers", None),
        (LEVELS, {}, "levels", 256),
        (LEVELS, {"levels": 6}, "levels", 6),
        (LEVELS.astype(np.int64), {"levels": 6}, "levels", 6),
        (LEVELS.astype(np.float32), {"levels": 6, "read_as": "levels"}, "levels", 6),
        (LEVELS[:, :3], {"levels": 6}, "levels", 6),
        (LEVELS[:, 0, 0], {"levels": 7}, "levels", 7),
        (BITS, {}, "bits", None),
        (BITS.astype(np.uint8), {}, "bits", None),
        (BITS.astype(np.float32), {}, "bits", None),
        (BITS.astype(np.float64), {"read_as": "numbers"}, "numbers", None),
        (BITS.astype(np.uint8), {"read_as": "levels", "levels": 2}, "levels", 2),
        (BITS, {"read_as": "levels", "levels": 2}, "levels", 2),
        (LEVELS, {"binarize": "threshold", "levels": 6}, "bits", 6),
        (LEVELS[:, :3, :3], {"network": "mlp"}, "levels", 256),
    ],
)
def test_what_is_read_is_what_comes_out(made, tmp_path, x, options, read_as, levels):
    folder, path = tmp_path / "run", made(x)
    if prepared(path, **options)[0].model.network == "unet":
        options = {**options, "channels": (8,)}
    assert train(path, folder, **options, train_steps=1).code == 0
    run = Run.opened(folder)
    shape = x.shape[1:] or (1,)
    assert (run.form.read_as, run.plan.reading.levels, tuple(run.form.event_shape)) == (read_as, levels, shape)
    with np.load(folder / "samples.npz") as file:
        samples = file["samples"]
    assert samples.shape == (3, *shape)
    if read_as == "numbers":
        assert samples.dtype.kind == "f"
        assert np.isfinite(samples).all()
    else:
        assert samples.dtype.kind == "u" or levels > 256
        assert samples.max() < (2 if read_as == "bits" else levels)
    found = pyrodiff.Bound.load(folder / "bound.npz")
    assert found.levels == {"numbers": None, "levels": levels, "bits": 2}[read_as]
    assert found.nats.isfinite().all()
    assert tuple(found.event_shape) == shape


LONE = np.zeros((40, 3), np.uint8)
LONE[:20] = 1


@pytest.mark.parametrize("part", [0, 4, 39])
def test_a_level_that_only_a_part_has(made, tmp_path, part):
    """All data say what they are, not those that are learned from alone."""
    x = LONE.copy()
    x[torch.randperm(40, generator=torch.Generator().manual_seed(0))[part]] = 2
    path = made(x)
    assert prepared(path)[1].form.read_as == "levels"
    assert train(path, tmp_path / "run", read_as="bits").is_refused("--read-as")


# Bits of levels


def test_bits_by_a_threshold(made):
    _, data = prepared(made(LEVELS), binarize="threshold", levels=6)
    _, plain = prepared(made(LEVELS), levels=6)
    assert torch.equal(data.parts["train"][:], (plain.parts["train"][:] >= 3).to(data.parts["train"][:].dtype))
    for name in ("validation", "test"):
        assert torch.equal(data.parts[name][:], (plain.parts[name][:] >= 3).to(data.parts["train"][:].dtype))


def test_bits_that_are_drawn(made):
    x = np.random.default_rng(0).integers(0, 6, (4000, 4)).astype(np.uint8)
    path = made(x)
    _, plain = prepared(path, levels=6)
    for kind in ("static", "dynamic"):
        (_, data), (_, again) = (prepared(path, binarize=kind, levels=6) for _ in range(2))
        assert all(same(data.parts[name][:], again.parts[name][:]) for name in ("validation", "test"))
        assert torch.equal(data.split("train"), again.split("train"))
        for name in ("train", "validation", "test"):
            bits, raw = data.split(name), plain.parts[name][:]
            assert set(bits.unique().tolist()) == {0, 1}
            for level in range(6):
                there = bits[raw == level]
                error = 5 * math.sqrt(max(level / 5 * (1 - level / 5), 1e-12) / len(there))
                assert float(there.mean()) == pytest.approx(level / 5, abs=error + 1e-6)


def test_dynamic_bits_are_drawn_anew_and_static_ones_are_not(made):
    path = made(np.full((40, 200), 3, np.uint8) + (np.arange(40)[:, None] % 2).astype(np.uint8))
    rows = {}
    for kind in ("static", "dynamic", "threshold"):
        _, data = prepared(path, binarize=kind, levels=6)
        rows[kind] = len(data.draw(400)[0].unique(dim=0))
    assert rows["dynamic"] == 400
    assert rows["static"] <= 32
    assert rows["threshold"] == 1


def test_what_is_drawn_to_learn_from_is_of_the_training_data_alone(made):
    _, data = prepared(made(LEVELS), levels=6)
    known = set(map(bytes, data.parts["train"][:].numpy()))
    drawn = data.form.decoded(data.draw(500)[0])
    assert set(map(bytes, drawn.numpy())) == known


def test_flipped_pictures(made):
    x = LEVELS.copy()
    _, data = prepared(made(x), levels=6, augment="flip")
    raw = data.form.encoded(data.parts["train"][:])
    drawn = data.draw(2000)[0]
    straight = torch.tensor([bool((one == raw).flatten(1).all(1).any()) for one in drawn])
    turned = torch.tensor([bool((one.flip(-1) == raw).flatten(1).all(1).any()) for one in drawn])
    assert (straight | turned).all()
    assert float(straight.float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 2000**0.5)
    torch.testing.assert_close(data.split("validation"), data.form.encoded(data.parts["validation"][:]))


def test_strokes_are_drawn_to_learn_from_and_not_to_evaluate_on():
    (_, data), (_, plain) = (prepared("digits", augment=kind) for kind in ("strokes", "none"))
    assert all(same(data.parts[name][:], plain.parts[name][:]) for name in ("validation", "test"))
    known = set(map(bytes, data.parts["train"][:].to(torch.uint8).numpy()))
    drawn = data.form.decoded(data.draw(300)[0])
    others = [bytes(one) not in known for one in drawn.numpy()]
    assert not any(others[:100])
    assert sum(others[100:]) > 150


def test_how_often_a_level_is(made):
    _, data = prepared(made(LEVELS), levels=6)
    often = data.often()
    assert often.shape == (4, 4, 6)
    torch.testing.assert_close(often.sum(-1), torch.ones(4, 4))
    counts = torch.stack([(data.parts["train"][:] == level).float().mean(0) for level in range(6)], -1)
    assert float((often - counts).abs().max()) < 8 / len(data.parts["train"][:])
    assert (often > 0).all()


# Every model


def places(read_as):
    return {"numbers": LEVELS + np.random.default_rng(0).random(LEVELS.shape), "levels": LEVELS, "bits": LEVELS > 3}[
        read_as
    ]


ALL = list(
    itertools.product(
        ("numbers", "levels", "bits"), ("mlp", "unet"), ("noise", "data", "velocity", "score", "level", "logit")
    )
)
FIT = {
    "numbers": {"noise", "data", "velocity", "score"},
    "levels": {"noise", "data", "velocity", "score", "level"},
    "bits": {"logit"},
}


@pytest.mark.filterwarnings("ignore:the step from t")  # of networks that are not trained
@pytest.mark.parametrize(("read_as", "network", "prediction"), ALL)
def test_every_model_has_a_finite_bound_or_is_refused(made, tmp_path, read_as, network, prediction):
    options = {"network": network, "prediction": prediction, "T": 3}
    options = {**options, "channels": (8,)} if network == "unet" else options
    options = {**options, "levels": 6} if read_as == "levels" else options
    path = made(places(read_as))
    if prediction not in FIT[read_as] or (prediction, network) == ("level", "mlp"):
        assert train(path, tmp_path / "run", **options).is_refused("--prediction", prediction)
        assert not (tmp_path / "run").exists()
        return
    for schedule in ("reciprocal", "log-snr" if network == "mlp" else "linear"):
        if schedule == "reciprocal" and read_as != "bits":
            assert train(path, tmp_path / "run", **options, schedule=schedule).is_refused("--schedule")
            continue
        run, data = begun(path, tmp_path / "run", **options, schedule=schedule)
        found = pyrodiff.bound(run.diffusion, data.split("test"), generator=0)
        assert found.nats.isfinite().all()
        assert run.svi.step(data.draw(4)[0]).isfinite()
        assert run.sampler("ancestral")(2, generator=0).isfinite().all()


@pytest.mark.parametrize(
    ("x", "options", "name"),
    [
        (FLOATS, {"network": "unet"}, "network"),
        (FLOATS, {"channels": (8, 8)}, "channels"),
        (FLOATS, {"attention": (4,)}, "attention"),
        (FLOATS, {"levels": 5}, "levels"),
        (FLOATS, {"read_as": "bits"}, "read_as"),
        (FLOATS, {"binarize": "static"}, "binarize"),
        (FLOATS, {"augment": "flip"}, "augment"),
        (FLOATS, {"augment": "strokes"}, "augment"),
        (FLOATS, {"log_snr_first": 5.0}, "log_snr_first"),
        (FLOATS, {"log_snr_last": -5.0, "schedule": "linear"}, "log_snr_last"),
        (FLOATS, {"log_snr_last": 5.0, "log_snr_first": 4.0, "schedule": "log-snr"}, "log_snr"),
        (FLOATS, {"array": "x"}, ""),
        (FLOATS, {"final_times": 5}, "final_times"),
        (FLOATS, {"final_times": 1, "T": 1}, "final_times"),
        (FLOATS, {"hidden": 7}, "hidden"),
        (FLOATS, {"hidden": 0}, "hidden"),
        (LEVELS, {"weighting": "simple"}, "weighting"),
        (LEVELS, {"read_as": "numbers"}, "read_as"),
        (LEVELS, {"levels": 5}, "levels"),
        (LEVELS, {"levels": 257}, "levels"),
        (LEVELS, {"binarize": "static", "read_as": "levels"}, "binarize"),
        (LEVELS, {"channels": (3, 5), "levels": 6}, "channels"),
        (LEVELS, {"channels": (8, 8, 8, 8), "levels": 6}, ""),
        (LEVELS, {"attention": (3,), "levels": 6}, "attention"),
        (LEVELS[:, :3, :3], {"network": "unet", "channels": (8, 8)}, ""),
        (LEVELS.astype(np.int64), {}, "levels"),
        (LEVELS.astype(np.int64), {"levels": 10**8}, "levels"),
        (LEVELS.astype(np.int64) - 1, {"levels": 6}, "levels"),
        (BITS, {"variance": "forward"}, "variance"),
        (BITS, {"levels": 2}, "levels"),
        (BITS, {"binarize": "threshold"}, "binarize"),
        (BITS, {"read_as": "numbers"}, "read_as"),
    ],
)
def test_options_that_do_not_go_together(made, tmp_path, x, options, name):
    done = train(made(x), tmp_path / "run", **options)
    assert done.is_refused(name.replace("_", "-"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(("x", "options"), [(FLOATS, {"drawing": "loss-second-moment"}), (LEVELS, {}), (BITS, {})])
def test_few_steps(made, tmp_path, monkeypatch, T, x, options):
    with_pictures(monkeypatch.setattr)
    monkeypatch.setattr(Figure, "savefig", blank)  # they are made, but not drawn
    if x is LEVELS:
        options = {"levels": 6, "channels": (8,)}
    path = made(x)
    assert train(path, tmp_path / "run", **options, T=T, train_steps=2).code == 0
    assert call("plot", tmp_path / "run").code == 0
    assert call("sample", tmp_path / "run", "--number=2", "--trajectory=strip").code == 0


# No option does nothing


def fingerprint(data, folder, **options):
    """All that a run does, part by part in the order that they follow from each other."""
    run, data = begun(data, folder, **{"evaluate_every": 6, **options})
    with kept_sources():
        torch.manual_seed(0)
        found = {"data": [*(part[:] for part in data.parts.values()), data.draw(50)[0], vars(data.form)["scale"]]}
    start = {name: value.clone() for name, value in run.diffusion.state_dict().items()}
    schedule, reverse = run.diffusion.forward_process.schedule, run.diffusion.reverse
    variance = getattr(reverse, "variance", None)
    found["model"] = [start, repr(schedule), type(reverse.denoiser).__name__, type(variance).__name__]
    trainer = Trainer(run, data, Stop())
    trainer.train()
    trainer.close()
    end = checkpoints.load(runs.last_checkpoint(folder))
    found["weights"] = [
        dict(run.diffusion.state_dict()),
        end["svi"]["keepers" if "keepers" in end["svi"] else "modules"],
    ]
    found["metrics"] = notes(folder)
    found["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return found


PARTS = ("data", "model", "weights", "metrics", "files")
OPTIONS = {  # name -> the data, options, the other value, the first part that is another
    "data": (BITS, {}, None, "data"),
    "read_as": (BITS.astype(np.float32), {}, "numbers", "data"),
    "levels": (LEVELS, {"network": "mlp", "prediction": "data"}, 9, "data"),
    "binarize": (LEVELS, {"network": "mlp", "read_as": "bits", "binarize": "threshold"}, "static", "data"),
    "augment": (LEVELS, {"network": "mlp"}, "flip", "data"),
    "holdout": (FLOATS, {}, 0.2, "data"),
    "T": (FLOATS, {}, 6, "model"),
    "schedule": (FLOATS, {}, "linear", "model"),
    "log_snr_first": (FLOATS, {"schedule": "log-snr"}, 8.0, "model"),
    "log_snr_last": (FLOATS, {"schedule": "log-snr"}, -8.0, "model"),
    "prediction": (FLOATS, {}, "noise", "model"),
    "variance": (FLOATS, {}, "posterior", "model"),
    "network": (LEVELS, {}, "mlp", "model"),
    "channels": (LEVELS, {"channels": (8, 8)}, (8, 16), "model"),
    "attention": (LEVELS, {"channels": (8, 8)}, (2,), "model"),
    "hidden": (FLOATS, {}, 10, "model"),
    "blocks": (FLOATS, {}, 2, "model"),
    "dropout": (FLOATS, {}, 0.5, "weights"),
    "train_steps": (FLOATS, {}, 7, "weights"),
    "batch_size": (FLOATS, {}, 5, "weights"),
    "accumulate": (FLOATS, {}, 2, "weights"),
    "lr": (FLOATS, {}, 0.02, "weights"),
    "warmup": (FLOATS, {}, 4, "weights"),
    "weight_decay": (FLOATS, {}, 0.5, "weights"),
    "clip_norm": (FLOATS, {"lr": 0.3}, 1e-4, "weights"),
    "average": (FLOATS, {}, 0.0, "metrics"),
    "drawing": (FLOATS, {}, "uniform", "weights"),
    "weighting": (FLOATS, {}, "simple", "weights"),
    "autocast": (FLOATS, {}, "bfloat16", "weights"),
    "seed": (FLOATS, {}, 1, "model"),
    "evaluate_every": (FLOATS, {}, 3, "metrics"),
    "evaluate_on": (FLOATS, {}, 3, "metrics"),
    "evaluate_times": (FLOATS, {}, 2, "metrics"),
    "checkpoint_every": (FLOATS, {}, 5, "files"),
    "keep": (FLOATS, {}, 1, "files"),
    "log_every": (FLOATS, {}, 3, "metrics"),
}
ELSEWHERE = {  # the tests that see what they do
    "array": "test_an_array_of_several",
    "compile": "test_compile",
    "labels": "test_labels.py",
    "stream": "test_command_streaming.py",
    "workers": "test_command_streaming.py",
    "device": "test_a_gpu_that_is_not_there, of test_cli.py",
    "threads": "test_threads",
    "samples": "test_samples_and_final_times",
    "final_times": "test_samples_and_final_times",
}


def test_no_option_is_forgotten():
    assert set(options.names()) == OPTIONS.keys() | ELSEWHERE.keys()


KNOWN = {}  # what was found with the first values


@pytest.mark.filterwarnings("ignore:the step from t")  # of networks that are not trained
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_does_what_it_says_and_nothing_before(made, tmp_path, name):
    x, options, value, part = OPTIONS[name]
    path, key = made(x), repr((x, sorted(options.items())))
    if key not in KNOWN:
        KNOWN[key] = fingerprint(path, tmp_path / "ours", **options)
    ours = KNOWN[key]
    if name == "data":
        theirs = fingerprint(made(~x), tmp_path / "theirs", **options)
    else:
        theirs = fingerprint(path, tmp_path / "theirs", **{**options, name: value})
    differs = [one for one in PARTS if not same(ours[one], theirs[one])]
    assert differs, f"{flag(name)} does nothing"
    assert differs[0] == part, differs


def test_what_is_left_alone_is_the_same_twice(made, tmp_path):
    path = made(FLOATS)
    assert same(*(fingerprint(path, tmp_path / name) for name in "ab"))


def test_samples_and_final_times(made, tmp_path):
    path = made(FLOATS)
    assert train(path, tmp_path / "run", samples=7, final_times=2).code == 0
    with np.load(tmp_path / "run" / "samples.npz") as file:
        assert file["samples"].shape == (7, 2)
    drawn = pyrodiff.Bound.load(tmp_path / "run" / "bound.npz").denoising
    assert ((drawn != 0).sum(0) <= 2).all()
    assert (drawn != 0).any()


def test_threads(made, tmp_path, monkeypatch):
    """The number that is given, or else the fastest one, measured without a trace in the run, and recorded."""
    asked, path, measured, real = [], made(FLOATS), [], training.fastest_threads
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(measuring, "_physical_cores", lambda: 2)

    def fastest(work):
        real(lambda: measured.append(work()), seconds=0.01)
        return 2

    monkeypatch.setattr(training, "fastest_threads", fastest)
    assert train(path, tmp_path / "given", threads=2).code == 0
    assert (asked[0], measured) == (2, [])
    assert train(path, tmp_path / "measured").code == 0
    number = len(measured)
    assert number > 0
    assert asked[-1] == 2
    record = [options.read(tmp_path / name / "settings.toml", "record") for name in ("given", "measured")]
    assert record[0] == record[1]
    ours, theirs = (checkpoints.load(tmp_path / name / "checkpoints" / "best.pt") for name in ("given", "measured"))
    del ours["more"]["state"]["seconds"], theirs["more"]["state"]["seconds"]
    assert same(ours, theirs)
    assert call("train", "--out", tmp_path / "measured", "--resume", "--train-steps=8").code == 0
    assert len(measured) == number, "a run is resumed with the number that it had"


def test_compile(made, tmp_path, monkeypatch):
    asked, make = [], runs.SVI
    monkeypatch.setattr(runs, "SVI", lambda *args, **options: (asked.append(options), make(*args, **options))[1])
    path = made(FLOATS)
    for compile in (False, True):
        begun(path, tmp_path / str(compile), compile=compile)
    assert [one["compile"] for one in asked] == [False, True]


# Known data


@pytest.mark.parametrize("name", options.BUILT_IN)
def test_the_data_that_are_built_in(monkeypatch, name):
    if name == "checkerboard":  # a million takes a while
        make = datasets.checkerboard
        monkeypatch.setattr(datasets, "checkerboard", lambda size, seed: make(min(size, 10**4), seed))
    plan, data = prepare({"data": name}, CPU)
    assert plan.reading.read_as == {"heartbeat": "bits", "digits": "levels"}.get(name, "numbers")
    assert data.form.log_scale == 0.0
    assert Plan.of(plan.values()) == plan
    again, _ = prepare(plan.values(), CPU)
    assert again == plan, "what was completed is complete"
    assert words(**plan.values())
    train_data = data.parts["train"][:].flatten(1)
    for part in (data.parts["validation"][:], data.parts["test"][:]):
        if name in ("swiss-roll", "checkerboard"):
            seen = set(map(bytes, train_data.numpy()))
            assert not any(bytes(one) in seen for one in part.flatten(1).numpy())


def test_the_swiss_roll_is_that_of_the_readme():
    """The kernels, the schedule, the network and the training of examples/swiss_roll.py, whose number README has."""
    plan, data = prepare({"data": "swiss-roll"}, torch.device("cpu"))
    reverse = models.build(plan, data.form).reverse
    assert isinstance(reverse.variance, pyrodiff.ForwardVariance)
    assert isinstance(reverse.denoiser, pyrodiff.VelocityPrediction)
    schedule = pyrodiff.LogSNRSchedule(num_steps=40, first=7.5, last=-6.0)
    torch.testing.assert_close(
        reverse.forward_process.schedule.beta(torch.arange(1, 41)), schedule.beta(torch.arange(1, 41))
    )
    example = pyrodiff.networks.MLP(event_shape=(2,), hidden=128)
    assert [p.shape for p in reverse.denoiser.network.parameters()] == [p.shape for p in example.parameters()]
    assert (plan.training.train_steps, plan.training.batch_size, plan.training.lr) == (3000, 256, 2e-3)


def test_attention_follows_the_channels():
    assert plans._attention(16, 2) == (8,)
    assert plans._attention(16, 3) == (8, 4)
    assert plans._attention(8, 2) == (0,)
