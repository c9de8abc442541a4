"""Every example runs, at a small size, and what it prints is what it returns. How good it gets is not tested."""

import ast
import contextlib
import functools
import gzip
import importlib
import json
import os
import re
import socket
import sys
from pathlib import Path

import parted
import pytest
import torch
from matplotlib.figure import Figure

import pyrodiff
from pyrodiff import datasets, networks

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.fixture
def example(monkeypatch):
    """Imports an example: few data, 300 at most to train on and 16 to score; small networks, pictures of few pixels."""
    monkeypatch.syspath_prepend(str(FOLDER))
    kept = {name: getattr(datasets, name) for name in ("swiss_roll", "checkerboard", "eight_gaussians", "heartbeat")}
    for name, draw in kept.items():
        monkeypatch.setattr(datasets, name, lambda n, seed=0, draw=draw: draw(min(n, 16 if seed > 1 else 300), seed))
    digits = datasets.digits

    def few(split="train", binary=False):
        return digits(split, binary)[: 300 if split == "train" else 8]

    def in_few_pixels(figure, *args, save=Figure.savefig, **options):
        save(figure, *args, **{**options, "dpi": 20})

    def narrow(shape, channels, make=networks.UNet, **options):
        return make(shape, tuple(8 for _ in channels), **options)

    monkeypatch.setattr(datasets, "digits", few)
    monkeypatch.setattr(networks, "UNet", narrow)
    monkeypatch.setattr(Figure, "savefig", in_few_pixels)
    return importlib.import_module


def shortened(monkeypatch, name, long, short):
    """Let a schedule of so many steps have fewer."""
    schedule = getattr(pyrodiff, name)
    monkeypatch.setattr(pyrodiff, name, lambda num_steps: schedule(short if num_steps == long else num_steps))


def numbers_of(bound):
    """A bound as the row of its table begins."""
    return next(line for line in str(bound).splitlines() if line.startswith("bound  "))[:35].rstrip()


def check(bound, out, capsys, *pictures):
    """The bound is finite and was printed, and the pictures are there."""
    assert bool(bound.nats.isfinite().all())
    printed = capsys.readouterr().out
    assert f"\n{numbers_of(bound)} " in printed, printed
    for picture in pictures:
        assert (out / picture).read_bytes().startswith(b"\x89PNG"), picture
    return printed


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_short_and_says_how_it_is_run(script):
    source = script.read_text()
    assert len(source.splitlines()) < (200 if script.stem == "minipyrodiff" else 120)  # which is a whole library
    docstring = ast.get_docstring(ast.parse(source))
    if 'if __name__ == "__main__":' in source:
        assert re.search(rf"^ *(python|torchrun .*) examples/{script.name}", docstring, re.MULTILINE)
        assert re.search(r"second|minute|hour", docstring)
        assert re.search(r"\d\.\d", docstring), "the number to expect"
        assert "@" not in docstring
    else:
        assert re.search(r"nothing to run", docstring.replace("\n", " "))


def test_the_swiss_roll(example, tmp_path, capsys):
    bound = example("swiss_roll").main(tmp_path, 2)
    printed = check(bound, tmp_path, capsys, "swiss_roll.png")
    assert f"K = {float(bound.K.mean()):.2f}" in printed


def test_the_picture(example, tmp_path, capsys):
    bounds = example("picture").main(tmp_path, 2)
    printed = capsys.readouterr().out
    for name, bound in bounds.items():
        assert re.search(rf"^{name} +{float(bound.mean):.2f} ± \d\.\d\d nats$", printed, re.MULTILINE)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_short_chains(example, monkeypatch, tmp_path, capsys):
    module = example("short_chains")
    monkeypatch.setattr(module, "T", 16)
    monkeypatch.setattr(module, "STEPS", (3, 5))
    bounds = module.main(tmp_path, 2)
    assert all(bool(bound.nats.isfinite().all()) for bound in bounds.values())
    printed = capsys.readouterr().out
    assert f"{float(bounds['analytic', 'best', 5].mean):9.3f} ± " in printed
    assert (tmp_path / "short_chains.png").read_bytes().startswith(b"\x89PNG")


def test_a_learned_schedule(example, tmp_path, capsys):
    bounds = example("learned_schedule").main(tmp_path, 2)
    assert all(bool(bound.nats.isfinite().all()) for bound in bounds.values())
    printed = capsys.readouterr().out
    assert all(f"{float(bound.mean):.3f} ± " in printed for bound in bounds.values())
    assert (tmp_path / "learned_schedule.png").read_bytes().startswith(b"\x89PNG")


def test_the_heartbeat(example, tmp_path, capsys, monkeypatch):
    shortened(monkeypatch, "ReciprocalSchedule", 2000, 50)
    bound = example("heartbeat").main(tmp_path, 2)
    printed = check(bound, tmp_path, capsys, "heartbeat.png")
    assert f"at least {-float(bound.bits.mean()):.3f}" in printed
    assert bound.num_steps == 50


def test_the_checkerboard(example, tmp_path, capsys):
    check(example("checkerboard").main(tmp_path, 2), tmp_path, capsys, "checkerboard.png", "checkerboard_terms.png")


def test_the_binary_digits_beside_simple_models(example, tmp_path, capsys):
    printed = check(example("binary_digits").main(tmp_path, 2), tmp_path, capsys, "binary_digits.png")
    found = {name: float(nats) for name, nats in re.findall(r"test split, (.*?) +(\d+\.\d+) ±", printed)}
    mixture = next(nats for name, nats in found.items() if name.startswith("mixture"))
    assert 15 < mixture < 20 < found["Bernoulli per pixel"] < 28  # of few pictures; 17.3 and 25.2 of all


@pytest.mark.parametrize("prediction", ["level", "velocity"])
def test_the_digits_in_their_levels(example, tmp_path, capsys, monkeypatch, prediction):
    if prediction == "velocity":  # once is enough
        monkeypatch.setattr(example("baselines"), "of_levels", lambda *splits: {})
    bound = example("digits").main(tmp_path, 2, prediction, T=100)
    printed = check(bound, tmp_path, capsys, "digits.png")
    found = {name: float(bits) for name, bits in re.findall(r"^  (\S.*?) +(\d+\.\d+) ±", printed, re.MULTILINE)}
    assert found[f"bound, T = 100, {prediction} prediction"] == round(float(bound.bits_per_dim.mean()), 4)
    if prediction == "level":
        assert found["mixture of 10 categoricals"] < found["histogram per pixel"] < found["uniform"] == 4.0875
    assert found["T = 3"] > found["T = 10"] > found["T = 30"]


def test_the_demo_runs_all_three(example, tmp_path, capsys, monkeypatch):
    demo, ran = example("demo"), []
    for name in ("binary_digits", "swiss_roll", "heartbeat"):
        monkeypatch.setattr(getattr(demo, name), "main", lambda out, steps, name=name: ran.append((name, out, steps)))
    assert list(demo.main(tmp_path, 7)) == ["binary_digits", "swiss_roll", "heartbeat"]
    assert ran == [(name, tmp_path, 7) for name in ("binary_digits", "swiss_roll", "heartbeat")]
    assert str(tmp_path) in capsys.readouterr().out


def test_the_sandwich_around_what_is_known(example, tmp_path, capsys, monkeypatch):
    sandwich = example("sandwich")
    monkeypatch.setattr(sandwich, "PARTICLES", (1, 2, 64))
    shortened(monkeypatch, "CosineSchedule", 1000, 500)
    for name in ("gaussian", "eight_gaussians", "bits"):
        build = getattr(sandwich, name)
        monkeypatch.setattr(sandwich, name, lambda *args, build=build: _cut(*build(*args)))
    tables = sandwich.main(tmp_path)
    printed = capsys.readouterr().out
    for name, estimates in tables.items():
        assert f"{float(estimates['log p'].mean()):.4f}" in next(row for row in printed.splitlines() if name in row)
        loose, tight = (estimates["log p"] - estimates[bound] for bound in ("ELBO", "IW_64"))
        error = 5 * float((loose - tight).std()) / len(loose) ** 0.5
        assert float(tight.mean()) < float(loose.mean()) + error
    assert float((tables["bits, T = 4"]["log p"] - tables["bits, T = 4"]["ELBO"]).mean()) > 1
    eight = tables["eight Gaussians, T = 1000"]
    torch.testing.assert_close(eight["flow"], eight["log p"], atol=1e-3, rtol=0)
    assert (tmp_path / "sandwich.png").exists()


def _cut(diffusion, x_0, log_p):
    return diffusion, x_0[:8], log_p[:8]


def test_how_t_is_drawn(example, tmp_path, capsys):
    settings = {"num_particles": 2, "num_pairs": 4, "batch_size": 32}
    accounts = example("drawings").main(tmp_path, 3, **settings)
    printed = capsys.readouterr().out
    for name, account in accounts.items():
        assert f"{name}: {account}" in printed
        assert (tmp_path / f"variance_{name}.png").exists()


def test_the_price_of_the_variance(example, capsys):
    bounds = example("variances").main()
    printed = capsys.readouterr().out
    assert len(bounds) == 4
    for name, bound in bounds.items():
        assert f"{name:42}{float(bound.nats.mean()):7.3f} " in printed
    means = [float(bound.nats.mean()) for bound in bounds.values()]
    assert all(posterior > 4 > forward > 2.5 for posterior, forward in zip(means[::2], means[1::2], strict=True))


def test_a_variant_of_ones_own(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pyrodiff, "verify", functools.partial(pyrodiff.verify, num_repeats=20))
    bounds = example("custom_variant").main(tmp_path, 60)
    printed = capsys.readouterr().out
    for name, bound in bounds.items():
        row = next(row for row in printed.splitlines() if row.strip().startswith(name))
        before, after = (float(number) for number in re.findall(r"(-?\d+\.\d+) (?:before|±)", row))
        assert after == round(float(bound.nats.mean()), 3)
        assert after < before
    assert printed.count("9 of 9 claims of verify hold") == 2
    assert (tmp_path / "custom_variant.png").exists()


def test_two_processes_get_what_one_gets(example, tmp_path, capsys):
    """As ``torchrun`` would start them, which the tutorial of several processes does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    started = [parted.context().Process(target=_ranked, args=(rank, meet, tmp_path)) for rank in (0, 1)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(120)
    finally:
        for process in started:
            process.kill()
            process.join()
    said = [(tmp_path / f"said by {rank}").read_text() for rank in (0, 1)]
    assert [process.exitcode for process in started] == [0, 0], said
    assert "2 processes on cpu" in said[0]
    assert said[0].count("bound on -log p(x_0)") == 1
    assert said[1] == ""
    bound = example("multi_gpu").main(tmp_path, 3)  # from the checkpoint, on other data
    alone = capsys.readouterr().out
    assert "resumes at step 3" in alone
    assert numbers_of(bound) in alone


def _ranked(rank, meet, folder):
    """What one process of two says, but for its errors."""
    torch.set_num_threads(1)
    os.environ.update(meet, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.path.insert(0, str(FOLDER))
    with (folder / f"said by {rank}").open("w") as out, contextlib.redirect_stdout(out):
        importlib.import_module("multi_gpu").main(folder, 3)


@pytest.fixture
def pictures(tmp_path):
    """A folder like MNIST's: bright bars on black, 60 to train on and 8 to be scored."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, number in (("train", 60), ("t10k", 8)):
        k = torch.zeros(number, 28, 28, dtype=torch.uint8)
        for i in range(number):
            k[i, 4 + i % 5 : 24, 8 + i % 12 : 11 + i % 12] = 100 + torch.randint(150, (), dtype=torch.uint8)
        header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in k.shape)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + k.numpy().tobytes()))
    return folder


@pytest.mark.parametrize(("name", "unit"), [("fashion_mnist", "bits/dim"), ("binarized_mnist", "nats")])
def test_a_run_in_parts_is_one_run(example, tmp_path, pictures, capsys, name, unit):
    script, scores, long_run = (example(module) for module in (name, "scores", "long_run"))
    size = scores.Size((8, 16, 16), 1, 8, 4, 2, 5, 2, 2)
    results = {}
    for parts in (1, 2):
        out = tmp_path / f"{parts} parts"
        given = ["--data", str(pictures), "--out", str(out), "--steps", "2", "--batch", "4", "--device", "cpu"]
        given += ["--no-compile", "--no-bfloat16"]
        limit = ["--minutes", "0"] if parts > 1 else []  # a step each
        for _ in range(parts):
            parser = long_run.options(script.__doc__, "out", num_steps=100, batch_size=100)
            result = script.main(parser.parse_args([*given, *limit]), size)
            assert (result is None) == (parts > 1)
        if result is None:
            result = script.main(parser.parse_args([*given, *limit]), size)  # all steps are taken
        results[parts] = result.nats
        printed = capsys.readouterr().out
        mean, _ = scores.mean(result, unit)
        assert f"test set, bound: {mean:.4f} ± " in printed
        rows = [json.loads(row) for row in (out / "curve.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert all(f"{row['held_out']:.4f} ± {row['error']:.4f} {unit}" in printed for row in rows)
        assert sorted(row["minutes"] for row in rows) == [row["minutes"] for row in rows]
        assert torch.equal(pyrodiff.Bound.load(out / "test.npz").nats, result.nats)
        assert all((out / picture).exists() for picture in ("curve.png", "samples.png"))
    assert torch.equal(results[1], results[2])


def test_ncsn(example, tmp_path, capsys, monkeypatch):
    ncsn = example("ncsn")
    monkeypatch.setattr(ncsn, "NUM_UPDATES", 2)
    samples = ncsn.main(tmp_path, 5, num_samples=50)
    printed = capsys.readouterr().out
    for name, x in samples.items():
        assert f"{name}: {float((x.sum(1) < 0).float().mean()):.3f} ± " in printed
    assert len(samples) == 4
    assert printed.count(" nats") == 2
    assert (tmp_path / "ncsn.png").read_bytes().startswith(b"\x89PNG")


def test_few_steps(example, tmp_path, capsys, monkeypatch):
    few = example("few_steps")
    monkeypatch.setattr(few, "T", 12)
    monkeypatch.setattr(few, "STEPS", (3, 5))
    split = few.datasets.digits
    monkeypatch.setattr(few.datasets, "digits", lambda name: split(name)[:6])
    found = few.main(tmp_path, 2)
    printed = capsys.readouterr().out
    assert len(found) == 14
    for (name, K), bits in found.items():
        assert bits.shape == (6,)
        assert any(line.startswith(name) and f"T = {K:4}" in line for line in printed.splitlines())
    for name in ("of T = 1000, even", "trained so, fixed schedule", "trained so, learned schedule"):
        before = "of T = 1000, even times" if "even" in name else name
        assert found[f"{name}, best variance", 3].mean() < found[before, 3].mean()
    assert (tmp_path / "few_steps.png").exists()


def test_fast_sampling(example, tmp_path, capsys, monkeypatch):
    module = example("fast_sampling")
    monkeypatch.setattr(module, "CALLS", (8,))
    whole = module.problems
    monkeypatch.setattr(module, "problems", lambda num_steps: ((*of, 8, 8) for *of, _, _ in whole(num_steps)))
    monkeypatch.setattr(module, "NUM_DATA", 50)
    found = module.main(tmp_path, 3)
    printed = capsys.readouterr().out
    calls = {"Heun": 7, "predictor-corrector": 7, "annealed Langevin": 9, "DDIM": 8}
    for (_, name), [(number, error, standard_error)] in found.items():
        assert number == calls.get(name, number)
        assert f"{1000 * error:.1f} ± {1000 * standard_error:.1f}" in printed
    assert len(found) == 8 + 8 + 9
    assert all(100 < found[name, "flow"][0][0] < 1000 for name, _ in found)
    assert (tmp_path / "fast_sampling.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing(example, tmp_path, capsys, monkeypatch):
    inpainting = example("inpainting")
    half, whole = inpainting.half_a_digit, inpainting.posterior

    def few(*of, num_particles, generator):
        return whole(*of, num_particles=num_particles // 16, generator=generator)

    monkeypatch.setattr(inpainting, "half_a_digit", lambda diffusion: half(diffusion, 1))
    monkeypatch.setattr(inpainting, "posterior", few)
    shortened(monkeypatch, "LogSNRSchedule", 60, 15)
    eight, found = inpainting.main(tmp_path, 2)
    printed = capsys.readouterr().out
    assert all(f"{float(one.log_evidence):9.3f} ± {float(one.standard_error):.3f}" in printed for one in eight.values())
    assert all(f"{float(one.log_evidence):6.1f}" in printed for one in found)
    assert (tmp_path / "inpainting.png").read_bytes().startswith(b"\x89PNG")


def test_the_evidence_is_the_truth_whatever_the_noise(example, tmp_path, capsys):
    evidence = example("evidence")
    found = evidence.main(tmp_path, num_steps=60, num_particles=256)
    printed = capsys.readouterr().out
    for noise, (truth, estimate, error) in found.items():
        assert estimate == pytest.approx(truth, abs=5 * error + 0.03), noise  # of 60 steps
        assert f"{estimate:.3f} ± {error:.3f}" in printed
    y, s = torch.linspace(-8, 8, 4001).double(), 0.5
    total = torch.trapezoid(torch.tensor([evidence.truth(float(one), s) for one in y]).exp(), y)
    assert float(total) == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "evidence.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("given", [False, True])
def test_a_diffusion_as_the_prior_of_a_vae(example, tmp_path, pictures, capsys, monkeypatch, given):
    latent, autoencoders = example("latent_diffusion"), example("autoencoders")
    monkeypatch.setattr(autoencoders, "T", 6)
    gains = latent.main(tmp_path, 4, str(pictures) if given else None, num_seeds=1)
    printed = capsys.readouterr().out
    assert f"paired:  {float(gains[0].mean()):7.3f} ± " in printed
    assert len(gains[0]) == 8
    assert (tmp_path / "latent_diffusion.png").read_bytes().startswith(b"\x89PNG")


def test_all_steps_of_a_latent_diffusion_cost_what_one_that_is_drawn_says(example, monkeypatch):
    latent, autoencoders = example("latent_diffusion"), example("autoencoders")
    monkeypatch.setattr(autoencoders, "T", 6)
    x = latent.datasets.digits("test", binary=True)
    vae = autoencoders.VAE(x.shape[1:], 20, autoencoders.latent_prior())
    autoencoders.fit(vae, x, 30, "VAE")
    whole = torch.stack([sum(latent.costs(vae, x, seed).values()).mean() for seed in range(40)])
    drawn = torch.tensor([pyrodiff.pair_bound(vae.model, vae.guide, x).mean for _ in range(40)])
    error = ((whole.var() + drawn.var()) / 40).sqrt()
    assert abs(float(whole.mean() - drawn.mean())) < 5 * float(error)
    assert float(error) < 0.3


def test_random_weights_and_their_evidence(example, tmp_path, capsys, monkeypatch):
    bayesian = example("bayesian_diffusion")
    monkeypatch.setattr(bayesian, "DRAWS", 4)
    monkeypatch.setattr(bayesian, "SCALES", (0.3,))
    found = bayesian.main(tmp_path, 60)
    printed = capsys.readouterr().out
    for (_, name), costs in found.items():
        row = next(row for row in printed.splitlines() if row.strip().startswith(name))
        assert f"all data {float(costs['all data'].mean()):8.2f} ± " in row
        assert all(bool(nats.isfinite().all()) for nats in costs.values())
    assert len(found) == 3
    assert (tmp_path / "bayesian_diffusion.png").read_bytes().startswith(b"\x89PNG")
