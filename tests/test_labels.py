"""``pyrodiff train --labels``: the labels reach training, the bound, samples and a run that goes on."""

import shutil

import numpy as np
import pytest
import torch
from commands import call, saved, train

import pyrodiff
from pyrodiff.command.runs import Run

SIZE = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Points that stand at -1 or 1, as their label says."""
    path = tmp_path_factory.mktemp("data") / "xy.npz"
    y = np.arange(SIZE) % 2
    x = (2.0 * y - 1)[:, None] + 0.1 * np.random.default_rng(0).normal(size=(SIZE, 2))
    np.savez(path, x=x, y=y)
    return path


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A run, which tests leave as it is."""
    path = tmp_path_factory.mktemp("labels") / "run"
    done = train(data, path, "--labels", train_steps=6)
    assert done.code == 0, done.err
    return path


def test_the_network_is_told_the_labels(folder):
    run = Run.opened(folder, "best", "cpu")
    assert run.form.classes == 2
    x_0, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    told, other = (pyrodiff.bound(run.diffusion, x_0, labels, generator=0).nats for labels in (y, 1 - y))
    assert not torch.allclose(told, other)


def test_samples_have_one_label_after_the_other(folder, tmp_path):
    """In batches or at once, sample i has the label i mod 2."""
    for name, more in {"a": [], "b": ["--batch-size=3"]}.items():
        done = call("sample", folder, "--number=7", "--seed=2", "--save", tmp_path / f"{name}.npz", *more)
        assert done.code == 0, done.err
        assert np.load(tmp_path / f"{name}.npz")["samples"].shape == (7, 2)
    run = Run.opened(folder, "best", "cpu")
    draw, y = run.sampler("ancestral"), torch.arange(7) % 2
    expected = run.form.decoded(draw(7, y, generator=torch.Generator().manual_seed(2)))
    np.testing.assert_allclose(np.load(tmp_path / "a.npz")["samples"], expected.numpy(), rtol=1e-5)


def test_bound_and_plot_and_info(folder):
    for line in (["bound", folder, "--particles=2"], ["plot", folder], ["info", folder]):
        done = call(*line)
        assert done.code == 0, (line, done.err)


def test_a_run_goes_on_with_its_labels(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "run")
    assert call("train", "--out", folder, "--resume", "--train-steps=9").code == 0
    run = Run.opened(folder, "last", "cpu")
    assert run.svi.num_steps == 9
    assert run.form.classes == 2


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (np.arange(SIZE) / 2, ["whole numbers"]),
        (np.arange(SIZE - 1), ["as many as the data"]),
        (np.arange(SIZE) - 1, ["whole numbers from 0"]),
    ],
)
def test_labels_that_are_none_are_refused_before_anything_is_written(tmp_path, y, words):
    np.savez(tmp_path / "xy.npz", x=np.random.default_rng(0).normal(size=(SIZE, 2)), y=y)
    assert train(tmp_path / "xy.npz", tmp_path / "run", "--labels").is_refused(*words)
    assert not (tmp_path / "run").exists()


def test_data_without_labels_are_refused(tmp_path):
    assert train("swiss-roll", tmp_path / "run", "--labels").is_refused("--labels", "swiss-roll")
    path = saved(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(SIZE, 2)))
    assert train(path, tmp_path / "run", "--labels").code == 2
