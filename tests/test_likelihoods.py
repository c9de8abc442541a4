"""What is said of a likelihood, and kept of it: the units, the table, and the file."""

import functools
import io
import json
import math
import os
import pickle
import re
import zipfile
from contextlib import nullcontext

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from computing import IN_MEMORY, LIKELIHOODS, concrete, small
from exact import bit_diffusion, gaussian_diffusion
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyrodiff
from pyrodiff import Bound, FlowLikelihood, ImportanceBound, Likelihood
from pyrodiff.likelihood.estimate import rounded
from pyrodiff.running.evaluation import bytes_per_row

LOG2 = math.log(2)
SCHEDULE = pyrodiff.BetaSchedule([0.1, 0.2, 0.35])


def made_up(shape=(2,), T=4, B=3, levels=None, entropy=None, dtype=torch.float64):
    """A bound of made-up terms."""
    prior, denoising, reconstruction = torch.randn(B) + 1, torch.rand(T - 1, B) * 5, torch.randn(B) * 3
    terms = (term.to(dtype) for term in (prior, denoising, reconstruction))
    return Bound(*terms, event_shape=torch.Size(shape), levels=levels, prior_entropy=entropy)


def weighted(shape=(2,), K=5, B=3, levels=None, num_steps=4, dtype=torch.float64):
    return ImportanceBound((torch.randn(K, B) * 4 - 2).to(dtype), torch.Size(shape), levels, num_steps)


def flow(shape=(2,), S=3, B=4, levels=None, is_bound=False, num_probes=10):
    return FlowLikelihood(
        torch.randn(S, B).double(), is_bound, torch.Size(shape), levels, 7, num_probes, torch.full((B,), 61.5).double()
    )


# What all estimates share


X = torch.tensor([[1.0, -3.0], [0.4, 0.2], [-2.0, 1.5], [3.0, 0.7], [0.1, -0.6], [-1.2, -1.9], [2.2, 2.4]]).double()
LABELS = torch.arange(7)
every_estimate = pytest.mark.parametrize("name", LIKELIHOODS)
every_estimate_in_memory = pytest.mark.parametrize("name", IN_MEMORY)


@functools.cache
def of_three_steps(name):
    return LIKELIHOODS[name](small(T=3), X)


def test_every_public_likelihood_is_among_those_that_are_tested():
    found = {type(of_three_steps(name)).__name__ for name in LIKELIHOODS}
    assert concrete(Likelihood) == found | {"Yardstick"}  # which is of no diffusion: tests/test_yardsticks.py


@every_estimate
def test_what_is_found_is_a_number_for_each_datum_and_is_kept(name, tmp_path):
    it = of_three_steps(name)
    assert it.nats.shape == (7,)
    assert (it.event_shape, it.levels) == ((2,), None)
    assert not it.nats.requires_grad
    it.save(tmp_path / "it")
    assert same(type(it).load(tmp_path / "it"), it)


@every_estimate
def test_a_seed_gives_the_same_number_and_leaves_the_global_source_alone(name):
    diffusion, estimate = small(T=3), LIKELIHOODS[name]

    def nats(generator=None):
        return estimate(diffusion, X, generator=generator).nats

    before = torch.get_rng_state()
    first = nats(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(nats(3), first)
    generator = torch.Generator().manual_seed(5)
    before = torch.get_rng_state()
    draws = [nats(generator) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    if name != "flow":  # of two numbers it draws nothing
        assert not torch.equal(nats(4), first)
        assert not torch.equal(*draws)  # the generator goes on
        assert not torch.equal(nats(), nats())
        assert not torch.equal(torch.get_rng_state(), before)
    generator.manual_seed(5)
    assert torch.equal(nats(generator), draws[0])
    torch.manual_seed(1)
    plain = nats()
    torch.manual_seed(1)
    assert torch.equal(nats(), plain)


class Endless(torch.utils.data.IterableDataset):
    """Data that do not say how many they are."""

    def __iter__(self):
        return iter(X)


LOADERS = {
    "a tensor's": lambda: DataLoader(X, batch_size=3),
    "a data set's": lambda: DataLoader(TensorDataset(X), batch_size=2),
    "batches of one": lambda: DataLoader(TensorDataset(X), batch_size=1),
    "one batch": lambda: DataLoader(X, batch_size=100),
    "endless": lambda: DataLoader(Endless(), batch_size=2),
    "a list": lambda: list(X.split([5, 2])),
    "a tuple": lambda: X.split(3),
    "a list of tuples": lambda: [(batch,) for batch in X.split(3)],
    "a list of lists": lambda: list(DataLoader(TensorDataset(X), batch_size=3)),
    "a generator": lambda: (batch for batch in X.split(2)),
}


@every_estimate
def test_a_loader_of_any_kind_has_the_numbers_of_its_data_in_their_order(name):
    diffusion, estimate = small(T=3), LIKELIHOODS[name]
    whole = estimate(diffusion, X, generator=2).nats
    assert len(set(whole.tolist())) == 7
    for loader in LOADERS.values():
        torch.testing.assert_close(estimate(diffusion, loader(), generator=2).nats, whole, rtol=1e-9, atol=1e-9)


class Told(nn.Module):
    """x_0 is estimated as a part of x_t and a number for each label."""

    def __init__(self):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([-1.0, 0.3, 1.4]).double())

    def forward(self, x_t, t, y):
        return 0.4 * x_t + self.numbers[y][..., None]


@every_estimate
def test_each_datum_has_the_number_of_its_own_context(name):
    """In batches too; one row for all is that row for each."""
    diffusion, estimate, y = small(Told(), T=3), LIKELIHOODS[name], torch.tensor([2, 0, 1, 1, 0, 2, 1])
    found = estimate(diffusion, X, y, generator=1).nats
    alike = torch.stack([estimate(diffusion, X, torch.tensor([label]), generator=1).nats for label in range(3)])
    torch.testing.assert_close(found, alike[y, torch.arange(7)])
    assert not torch.allclose(alike[0], alike[1])
    batches = list(zip(X.split(3), y.split(3), strict=True))
    torch.testing.assert_close(estimate(diffusion, batches, generator=1).nats, found)


class Watched(nn.Module):
    """A denoiser with dropout, which may fail."""

    def __init__(self):
        super().__init__()
        self.inner, self.frozen = nn.Dropout(0.9), nn.Dropout(0.9).eval()
        self.scale, self.modes, self.fails = nn.Parameter(torch.ones(()).double()), [], False

    def forward(self, x_t, t):
        self.modes.extend(module.training for module in self.modules())
        if self.fails and self.modes and not self.training:
            raise RuntimeError("on purpose")
        return self.frozen(self.inner(x_t)) * self.scale


@every_estimate
@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_mode_within_and_each_modules_own_mode_after(name, fails):
    """And torch's source of random numbers, after errors too."""
    diffusion = small(Watched(), T=3)
    before, state = {part: module.training for part, module in diffusion.named_modules()}, torch.get_rng_state()
    diffusion.reverse.denoiser.fails = fails
    with pytest.raises(RuntimeError, match="on purpose") if fails else nullcontext():
        LIKELIHOODS[name](diffusion, X, generator=3)
    assert not any(diffusion.reverse.denoiser.modes)
    assert {part: module.training for part, module in diffusion.named_modules()} == before
    assert before["model.reverse.denoiser.inner"]
    assert not before["model.reverse.denoiser.frozen"]
    assert diffusion.reverse.denoiser.scale.grad is None
    assert torch.equal(torch.get_rng_state(), state)


@every_estimate_in_memory
def test_the_memory_budget_changes_no_number(name):
    diffusion, estimate = small(T=3), LIKELIHOODS[name]
    row, whole = bytes_per_row(diffusion, X[:1]), estimate(diffusion, X, generator=2).nats
    for rows in (9, 20):
        found = estimate(diffusion, X, generator=2, memory_budget=rows * row).nats
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=f"memory_budget must hold one datum, which takes {row} bytes"):
        estimate(diffusion, X, memory_budget=row - 1)
    for budget in (0, -1, True, 1e6, "1 GB"):
        with pytest.raises(ValueError, match="memory_budget must be"):
            estimate(diffusion, X, memory_budget=budget)


@every_estimate_in_memory
def test_the_dtype_is_that_of_the_data_and_half_precision_is_refused(name):
    diffusion, estimate = small(T=3), LIKELIHOODS[name]
    wide = estimate(diffusion, X, generator=2).nats
    narrow = estimate(diffusion.float(), X.float(), generator=2).nats
    assert narrow.dtype == torch.float32 or name == "flow"
    if name == "flow":  # which draws nothing
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-3)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="must be float32 or float64"):
            estimate(diffusion, X.to(dtype))


@every_estimate
@pytest.mark.parametrize("generator", [1.5, True, "3", (3,), np.random.default_rng(3)])
def test_a_source_of_another_kind_is_refused(name, generator):
    with pytest.raises(ValueError, match=r"generator must be a torch\.Generator, a seed or None"):
        LIKELIHOODS[name](small(T=3), X, generator=generator)


BAD_LOADERS = {
    "empty": (lambda: [], ("x_0", "at least one batch", "list")),
    "an empty DataLoader": (lambda: DataLoader(X[:0]), ("x_0", "at least one batch", "DataLoader")),
    "an empty batch": (lambda: [X, X[:0]], ("B >= 1", "in batch 1 of the loader")),
    "another shape": (lambda: [X, X, X[:, :1]], ("(7, 1)", "in batch 2 of the loader")),
    "another dtype": (lambda: [X.float(), X], ("float32", "in batch 0 of the loader")),
    "whole numbers": (lambda: [(X.long(), LABELS)], ("floating", "int64", "in batch 0 of the loader")),
    "not a number": (lambda: [X, X * math.nan], ("in batch 1 of the loader",)),
    "dicts": (lambda: iter([{"x": X}]), ("dict", "in batch 0 of the loader")),
    "ints": (lambda: range(3), ("int", "in batch 0 of the loader")),
    "nothing": (lambda: iter([None]), ("in batch 0 of the loader",)),
    "empty tuples": (lambda: iter([()]), ("tuple", "in batch 0 of the loader")),
    "arrays": (lambda: [(X.numpy(),)], ("ndarray", "in batch 0 of the loader")),
    "a dict": (lambda: {"x": X}, ("x_0", "dict")),
    "a path": (lambda: "data.npz", ("x_0", "str")),
    "numbers": (lambda: [[0.7, 0.7]], ("x_0", "list")),
    "integers": (lambda: X.long(), ("floating", "int64")),
    "None": (lambda: None, ("x_0", "NoneType")),
}


@every_estimate_in_memory
@pytest.mark.parametrize(("x_0", "words"), BAD_LOADERS.values(), ids=BAD_LOADERS)
def test_what_cannot_be_data_is_refused_by_name(name, x_0, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        LIKELIHOODS[name](small(T=3), x_0())
    for word in words:
        assert word in str(error.value)


# What is said of them


ALL = {"bound": made_up, "importance": weighted, "flow": flow}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("shape", "dims", "pixels"), [((), 1, 1), ((3,), 3, 3), ((8, 8), 64, 64), ((3, 8, 8), 192, 64), ((2, 3, 4), 24, 12)]
)
def test_every_unit_is_the_nats_over_what_it_counts(make, shape, dims, pixels):
    it = make(shape)
    for i, nats in enumerate(it.nats.tolist()):
        assert float(it.log_prob[i]) == -nats
        assert float(it.bits[i]) == pytest.approx(nats * math.log2(math.e), rel=1e-14)
        assert float(it.bits_per_dim[i]) == pytest.approx(nats / dims * math.log2(math.e), rel=1e-14)
        assert float(it.bits_per_pixel[i]) == pytest.approx(nats / pixels * math.log2(math.e), rel=1e-14)
        assert float(it.bits_per_dim_in_bins(width=2 / 256)[i]) == pytest.approx(nats / dims / LOG2 + 7, rel=1e-14)


def test_the_cost_of_a_uniform_byte_is_eight_bits():
    """Three bytes a pixel, each of 256 levels alike: 8 bits/dim, 24 bits/pixel."""
    nats = torch.full((2,), 3 * 8 * 8 * math.log(256), dtype=torch.float64)
    it = ImportanceBound(-nats[None], torch.Size((3, 8, 8)), levels=256)
    assert it.bits_per_dim.tolist() == pytest.approx([8, 8])
    assert it.bits_per_pixel.tolist() == pytest.approx([24, 24])
    assert it.bits.tolist() == pytest.approx([1536, 1536])


def test_K_of_2015_is_minus_the_bits():
    it = made_up()
    for K, prior, terms, reconstruction in zip(
        it.K.tolist(), it.prior.tolist(), it.denoising.T.tolist(), it.reconstruction.tolist(), strict=True
    ):
        assert K == pytest.approx(-(prior + math.fsum(terms) + reconstruction) / LOG2, rel=1e-14)


def gaussian(schedule, D, prior=None):
    forward = pyrodiff.GaussianForward(schedule)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.networks.MLP((D,), hidden=4, num_blocks=1))
    return pyrodiff.Diffusion(forward, reverse, (D,), prior=prior)


class Narrow(torch.nn.Module):
    """A prior that is a module: N(0, 0.3^2)."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((3,), 0.3))

    def forward(self):
        return dist.Normal(torch.zeros(3), self.scale).to_event(1)


PRIORS = {  # the diffusion, its data, -L_null in bits
    "VP": (lambda: gaussian(SCHEDULE, 3), 1.5 * math.log2(2 * math.pi * math.e)),
    "VE": (
        lambda: gaussian(pyrodiff.GeometricSchedule(4, 0.1, 7.0), 3),
        1.5 * math.log2(2 * math.pi * math.e * (1 + 49)),
    ),
    "a module": (lambda: gaussian(SCHEDULE, 3, Narrow()), 1.5 * math.log2(2 * math.pi * math.e * 0.09)),
    "bits": (
        lambda: pyrodiff.Diffusion(*binomial(torch.tensor([0.5, 0.1, 0.25])), (3,)),
        1 - 0.1 * math.log2(0.1) - 0.9 * math.log2(0.9) + 0.25 * 2 - 0.75 * math.log2(0.75),
    ),
}


def binomial(rate):
    forward = pyrodiff.BinomialForward(SCHEDULE, rate=rate)
    network = pyrodiff.networks.MLP((3 if isinstance(rate, torch.Tensor) else 20,), hidden=4, num_blocks=1)
    return forward, pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(network, forward))


@pytest.mark.parametrize("prior", PRIORS)
def test_L_null_is_minus_the_entropy_of_the_prior(prior):
    make, bits = PRIORS[prior]
    result = pyrodiff.bound(make(), torch.ones(2, 3))
    assert result.L_null == pytest.approx(-bits, rel=1e-6)


def test_L_null_of_twenty_bits_of_rate_a_fifth_is_the_published_number():
    """-14.4386 in Table App. 1 and D.1.2 of Sohl-Dickstein et al.: 20 bits of rate 0.2."""
    result = pyrodiff.bound(pyrodiff.Diffusion(*binomial(0.2), (20,)), torch.ones(2, 20))
    assert result.L_null == pytest.approx(-14.4386, abs=5e-5)
    assert result.levels == 2


def test_L_null_is_refused_where_the_entropy_of_the_prior_is_unknown():
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.tensor([[-2.0] * 3, [2.0] * 3]), 1.0).to_event(1)
    )
    result = pyrodiff.bound(gaussian(SCHEDULE, 3, mixture), torch.ones(2, 3))
    assert result.prior_entropy is None
    assert result.nats.isfinite().all()
    with pytest.raises(ValueError, match="prior must have an entropy"):
        _ = result.L_null


def log_erf_bin(low, high, mean, scale):
    """log P(low <= x < high) of N(mean, scale^2), a number at a time."""
    ends = [math.erf((end - mean) / scale / math.sqrt(2)) for end in (low, high)]
    return math.log((ends[1] - ends[0]) / 2)


@pytest.mark.parametrize("scale", [0.004, 0.3])
def test_the_density_of_dequantised_bytes_bounds_their_probability(scale):
    """8-bit data as (k + u) / 128 - 1; the mean over u is no less than -log2 P of the bins, near it if p is flat."""
    mean, k = torch.tensor([0.21, -0.4]).double(), torch.tensor([[155, 77], [154, 76], [156, 78]])
    diffusion = gaussian_diffusion(SCHEDULE, mean, torch.full((2,), scale**2).double())
    nodes = (torch.arange(400).double() + 0.5) / 400
    u = torch.stack([nodes, nodes[torch.randperm(400)]], -1)  # each number's noise evenly spread
    gaps = []
    for datum in k:
        x_0 = (datum + u) / 128 - 1
        costs = pyrodiff.importance_bound(diffusion, x_0, num_particles=1)  # exact kernels: the very density
        assert costs.levels is None
        bins = [(float(number) / 128 - 1, (float(number) + 1) / 128 - 1) for number in datum]
        exact = -sum(log_erf_bin(*ends, float(m), scale) for ends, m in zip(bins, mean, strict=True)) / 2 / LOG2
        gaps.append(float(costs.bits_per_dim_in_bins(width=2 / 256).mean()) - exact)
        spread = scale > 0.1 and 1e-3
        assert gaps[-1] >= -1e-4
        assert not spread or gaps[-1] < spread
    assert scale > 0.1 or max(gaps) > 0.1  # a density that varies within a bin: the bound is not tight


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_bins_are_refused_where_p_is_a_probability_already(make):
    with pytest.raises(ValueError, match=r"levels must be None.*256"):
        make(levels=256).bits_per_dim_in_bins(width=2 / 256)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_the_convention_says_what_p_is(make):
    for levels, words in ((None, "density, per unit of the data"), (2, "probability, of 2 levels"), (256, "of 256")):
        it = make(levels=levels)
        assert words in it.convention
        assert str(it).splitlines()[-1] == it.convention


@pytest.mark.parametrize("kind", ["gaussian", "bits"])
def test_a_result_knows_whether_p_is_a_probability(kind):
    exact = (torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double())
    diffusion = gaussian_diffusion(SCHEDULE, *exact) if kind == "gaussian" else bit_diffusion([0.1, 0.4], 0.2, 2)
    x_0 = torch.ones(2, 2).double()
    for result in (pyrodiff.bound(diffusion, x_0), pyrodiff.importance_bound(diffusion, x_0, num_particles=2)):
        assert result.levels == (None if kind == "gaussian" else 2)
        assert result.event_shape == (2,)


def table(it):
    """The printed rows, name to numbers."""
    return {line[:24].strip(): [float(word) for word in line[24:].split()] for line in str(it).splitlines()[2:-1]}


def row(values):
    """Mean and standard error by hand, in nats and in bits, each to the second digit of the error."""
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    last = [10.0 ** (math.floor(math.log10(one)) - 1) for one in (error, error / LOG2)]  # the place of that digit
    numbers = zip((mean, error, mean / LOG2, error / LOG2), (last[0], last[0], last[1], last[1]), strict=True)
    return [pytest.approx(number, abs=0.51 * place) for number, place in numbers]


def group_means(log_weights, k):
    """-log of the mean of k weights, the mean over the groups, a list over the data."""
    columns = []
    for column in log_weights.T.tolist():
        groups = [column[i : i + k] for i in range(0, len(column) - k + 1, k)]
        costs = [-math.log(math.fsum(math.exp(weight) for weight in group) / k) for group in groups]
        columns.append(math.fsum(costs) / len(costs))
    return columns


@pytest.mark.parametrize(("K", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (16, [1, 8, 16]), (99, [1, 64, 99])])
def test_the_table_of_an_importance_bound_has_its_numbers(K, ks):
    it = weighted((2, 3), K=K, B=7)
    rows = table(it)
    assert list(rows) == [*(f"K = {k}" for k in ks), "per dimension"]
    for k in ks:
        assert rows[f"K = {k}"] == row(group_means(it.log_weights, k))
    assert rows["per dimension"] == row([nats / 6 for nats in group_means(it.log_weights, K)])
    sizes = it.log_weights.double().exp().sum(0) ** 2 / it.log_weights.double().exp().square().sum(0)
    size = f"effective sample size {float(sizes.mean()):.3g} of K = {K}"
    title = f"importance-weighted bound on -log p(x_0), {size}, T = 4, mean of 7 data of 6 dimensions"
    assert str(it).splitlines()[0] == title


@pytest.mark.parametrize(
    ("error", "written"),
    [
        (0.0314, "1.163 ± 0.031"),
        (0.5, "1.16 ± 0.50"),
        (31.4, "1 ± 31"),
        (0.0, "1.1631 ± 0.0000"),
        (math.nan, "1.1631 ± nan"),
    ],
)
def test_a_number_is_written_to_the_second_digit_of_its_error(error, written):
    assert rounded(1.16314, error) == written


@pytest.mark.parametrize("levels", [None, 2, 17])
def test_a_summary_has_the_unit_that_people_compare(levels):
    it = made_up(levels=levels, B=9)
    values, unit = (it.bits_per_dim, "bits/dim") if levels == 17 else (it.nats, "nats")
    assert it.summary == f"{rounded(float(values.mean()), float(it.standard_error(values)))} {unit}"


def test_the_table_of_a_flow_has_its_numbers():
    it = flow((4,), S=2, B=5)
    assert list(table(it)) == ["-log p(x_0)", "per dimension"]
    means = [math.fsum(column) / 2 for column in it.estimates.T.tolist()]
    assert table(it)["-log p(x_0)"] == row(means)
    assert table(it)["per dimension"] == row([mean / 4 for mean in means])
    assert str(it).splitlines()[0] == "-log p(x_0) of the probability flow, T = 7, mean of 5 data of 4 dimensions"
    assert list(table(flow(is_bound=True))) == ["bound", "per dimension"]


def test_one_datum_of_one_dimension_has_no_standard_error():
    it = made_up((), B=1)
    assert str(it).splitlines()[0] == "bound on -log p(x_0), T = 4, mean of 1 data of 1 dimension"
    for numbers in table(it).values():
        assert [math.isnan(number) for number in numbers] == [False, True, False, True]


@pytest.mark.parametrize("T", [1, 4])
def test_bounds_add_up_to_the_bound_of_the_data_of_both(T):
    one, other = made_up(T=T, B=2, levels=2, entropy=1.5), made_up(T=T, B=5, levels=2, entropy=1.5)
    both = one + other
    assert both.nats.tolist() == one.nats.tolist() + other.nats.tolist()
    for name in ("prior", "reconstruction"):
        assert getattr(both, name).tolist() == getattr(one, name).tolist() + getattr(other, name).tolist()
    assert both.denoising.T.tolist() == one.denoising.T.tolist() + other.denoising.T.tolist()
    assert (both.num_steps, both.event_shape, both.levels, both.prior_entropy) == (T, one.event_shape, 2, 1.5)
    three = both + one
    assert three.nats.tolist() == both.nats.tolist() + one.nats.tolist()


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"T": 5}, r"denoising.*\([34],\) and \([34],\)"),
        ({"shape": (3,)}, "event_shape"),
        ({"levels": 2}, "levels.* None and 2"),
        ({"entropy": 0.5}, "prior_entropy"),
    ],
)
def test_bounds_of_different_models_do_not_add_up(other, word):
    for pair in ((made_up(), made_up(**other)), (made_up(**other), made_up())):
        with pytest.raises(ValueError, match=word.replace("None and 2", "")):
            _ = pair[0] + pair[1]


@pytest.mark.parametrize("other", [3, 0, None, "bound", weighted(), flow(), torch.ones(3)])
def test_a_bound_adds_to_nothing_else(other):
    with pytest.raises(TypeError):
        _ = made_up() + other


SAVED = {
    "bound": made_up,
    "bound of a scalar": lambda: made_up((), T=1, B=1),
    "bound of levels": lambda: made_up((3, 8, 8), levels=256, entropy=0.1 + 0.2),
    "bound in float32": lambda: made_up(dtype=torch.float32, entropy=-math.inf),
    "importance": weighted,
    "importance of levels": lambda: weighted((2, 2), K=1, levels=2, num_steps=1000, dtype=torch.float32),
    "flow": flow,
    "flow of levels": lambda: flow((3, 4, 4), S=1, levels=17, is_bound=True, num_probes=0),
}


def same(one, other):
    """Whether all fields are the same, bit by bit and in type."""
    assert type(one) is type(other)
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert getattr(other, name).dtype == value.dtype
            torch.testing.assert_close(getattr(other, name), value, rtol=0, atol=0, equal_nan=True)
        else:
            assert getattr(other, name) == value
            assert type(getattr(other, name)) is type(value)
    return True


@pytest.mark.parametrize("name", ["result.npz", "result", "with space.x.y"])
@pytest.mark.parametrize("make", SAVED.values(), ids=SAVED)
def test_what_is_saved_comes_back_as_it_was(make, name, tmp_path):
    it = make()
    assert it.save(tmp_path / name) is None
    assert os.listdir(tmp_path) == [name]
    assert same(type(it).load(tmp_path / name), it)
    assert same(type(it).load(str(tmp_path / name)), it)
    assert str(type(it).load(tmp_path / name)) == str(it)


def test_numbers_that_are_not_finite_come_back_too(tmp_path):
    terms = torch.tensor([math.inf, math.nan, -0.0]).double()
    it = Bound(terms, terms.expand(2, 3), terms.flip(0), torch.Size((2,)))  # a view of strange strides among them
    it.save(tmp_path / "it")
    assert same(Bound.load(tmp_path / "it"), it)
    assert math.copysign(1, float(Bound.load(tmp_path / "it").prior[2])) == -1


def test_a_bound_that_was_computed_comes_back_and_adds_up(tmp_path):
    diffusion, x_0 = bit_diffusion([0.1, 0.2, 0.4], 0.2, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    it = pyrodiff.bound(diffusion, x_0)
    it.save(tmp_path / "it")
    loaded = Bound.load(tmp_path / "it")
    assert same(loaded, it)
    assert (loaded + it).nats.tolist() == 2 * it.nats.tolist()
    weights = pyrodiff.importance_bound(diffusion, x_0, num_particles=3)
    weights.save(tmp_path / "weights")
    assert same(ImportanceBound.load(tmp_path / "weights"), weights)


def test_what_is_saved_is_compressed_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "it"
    made_up(T=1000, B=100).save(path)
    large = path.stat().st_size
    zeros = torch.zeros(100)
    Bound(zeros, torch.zeros(999, 100), zeros, torch.Size((2,))).save(path)
    assert path.stat().st_size < large / 20
    assert Bound.load(path).nats.tolist() == [0.0] * 100
    assert os.listdir(tmp_path) == ["it"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for a full disk."""
    resource = pytest.importorskip("resource")
    path, small, large = tmp_path / "it", made_up(), made_up(T=2000, B=50)
    small.save(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        for target in (path, tmp_path / "new"):
            with pytest.raises(OSError, match="too large"):
                large.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["it"]
    large.save(path)
    assert same(Bound.load(path), large)


def test_an_interruption_leaves_what_was_there(tmp_path, monkeypatch):
    path, it = tmp_path / "it", made_up()
    it.save(path)
    before = path.read_bytes()

    def interrupted(file, *args, **kwargs):
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made_up().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["it"]


def test_where_nothing_can_be_written_nothing_is(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "it", tmp_path / "file" / "it", tmp_path / "folder"):
        with pytest.raises(OSError):  # noqa: PT011 - which one is the system's
            made_up().save(path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_file_that_was_cut_short_is_refused(make, tmp_path):
    path = tmp_path / "it.npz"
    make().save(path)
    whole = path.read_bytes()
    for size in {*range(0, len(whole), 23), len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            type(make()).load(path)


def test_a_file_with_a_byte_changed_is_refused_or_whole_all_the_same(tmp_path):
    path, it = tmp_path / "it.npz", made_up()
    it.save(path)
    whole, reasons = path.read_bytes(), []
    for i in range(0, len(whole), 2):
        damaged = bytearray(whole)
        damaged[i] ^= 0x81 if i % 4 else 0x7F
        path.write_bytes(damaged)
        try:
            loaded = Bound.load(path)
        except ValueError as error:
            reasons.append(str(error))
        else:
            assert same(loaded, it)
    assert len(reasons) > len(whole) // 6
    assert all(str(path) in reason for reason in reasons)


class Harmful:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def torch_saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rest(**changes):
    text = {"class": "Bound", "event_shape": [2], "levels": None, "prior_entropy": None, **changes}
    return np.array(json.dumps({name: value for name, value in text.items() if value is not ...}))


TERMS = {"prior": np.zeros(3), "denoising": np.zeros((2, 3)), "reconstruction": np.zeros(3)}
FOREIGN = {
    "nothing": b"",
    "text": b"bound on -log p(x_0)\n1.0\n",
    "zeros": bytes(500),
    "a pickle": pickle.dumps({"prior": 1}),
    "a torch file": torch_saved({"prior": torch.ones(3)}),
    "an array": npy(np.zeros(3)),
    "arrays alone": npz(**TERMS),
    "no arrays": npz(rest=rest()),
    "an array too few": npz(rest=rest(), prior=np.zeros(3), denoising=np.zeros((2, 3))),
    "an array too many": npz(rest=rest(), **TERMS, extra=np.zeros(3)),
    "a field too many": npz(rest=rest(extra=3), **TERMS),
    "no class": npz(rest=rest(**{"class": ...}), **TERMS),
    "no event_shape": npz(rest=rest(event_shape=...), **TERMS),
    "another event_shape": npz(rest=rest(event_shape="2"), **TERMS),
    "text for numbers": npz(rest=rest(), **{**TERMS, "prior": np.array(["a", "b", "c"])}),
    "a list for fields": npz(rest=np.array("[1, 2]"), **TERMS),
    "a number for fields": npz(rest=np.array("1"), **TERMS),
    "no JSON": npz(rest=np.array("{"), **TERMS),
    "text for the levels": npz(rest=rest(levels="17"), **TERMS),
    "a list for an entropy": npz(rest=rest(prior_entropy=[1.0]), **TERMS),
    "a bool for the levels": npz(rest=rest(levels=True), **TERMS),
    "a negative event_shape": npz(rest=rest(event_shape=[-2]), **TERMS),
    "a number for a tensor": npz(rest=rest(global_kl=3), **TERMS),
    "a tensor for a number": npz(rest=rest(levels=...), **TERMS, levels=np.array(3)),
    "complex numbers": npz(rest=rest(), **{**TERMS, "prior": np.zeros(3, complex)}),
    "no data": npz(rest=rest(), prior=np.zeros(0), denoising=np.zeros((2, 0)), reconstruction=np.zeros(0)),
    "a scalar for the data": npz(rest=rest(), **{name: np.zeros(()) for name in TERMS}),
    "times that are none": npz(rest=rest(steps=3), **TERMS, times=np.full((2, 3), 9)),
    "deep JSON": npz(rest=np.array("[" * 100_000), **TERMS),
    "another class": npz(rest=rest(**{"class": "Likelihood"}), **TERMS),
}


def packed(claim, size):
    """A zip whose one array says that it has so many numbers, and has the size deflated zeros have."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (claim,)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("prior.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(size // 2**20):
                member.write(bytes(2**20))
        archive.writestr("rest.npy", npy(rest()))
    return buffer.getvalue()


def test_a_file_that_would_be_much_larger_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """A hundred megabytes of zeros in a tenth of one; and a header that claims what the file has not."""
    path = tmp_path / "it.npz"
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: pytest.fail("it is unpacked"))
    path.write_bytes(packed(100 * 2**17, 100 * 2**20))
    with pytest.raises(ValueError, match=r"it\.npz is not: it says that it holds 1048\d+ bytes, in 10\d+$"):
        Bound.load(path)
    path.write_bytes(packed(10**12, 2**20))
    with pytest.raises(ValueError, match=r"it\.npz is not: prior\.npy says that it has shape \(1000000000000,\)"):
        Bound.load(path)


def test_bounds_that_were_saved_with_all_their_terms_are_loaded(tmp_path):
    """As they were before ``times``: mostly zeros, that pack well."""
    denoising = np.zeros((999, 20_000), np.float32)
    denoising[np.arange(20_000) % 999, np.arange(20_000)] = 1 + np.random.default_rng(0).random(20_000)
    data = io.BytesIO()
    prior = np.random.default_rng(1).random(20_000, np.float32)
    np.savez_compressed(data, rest=rest(global_kl=None), prior=prior, denoising=denoising, reconstruction=prior)
    (tmp_path / "it.npz").write_bytes(data.getvalue())
    assert denoising.nbytes / len(data.getvalue()) > 50
    it = Bound.load(tmp_path / "it.npz")
    assert it.num_steps == 1000
    np.testing.assert_allclose(it.nats.numpy(), 2 * prior + denoising.sum(0), rtol=1e-5)


def test_the_foreign_files_are_foreign_by_one_thing_alone(tmp_path):
    (tmp_path / "it").write_bytes(npz(rest=rest(), **TERMS))
    assert Bound.load(tmp_path / "it").nats.tolist() == [0, 0, 0]


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_any_other_file_is_refused(content, tmp_path):
    path = tmp_path / "it.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Bound.load(path)


@pytest.mark.parametrize("wanted", [Bound, ImportanceBound, FlowLikelihood])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_file_of_another_class_is_refused(make, wanted, tmp_path):
    it = make()
    it.save(tmp_path / "it")
    if type(it) is wanted:
        assert same(wanted.load(tmp_path / "it"), it)
        return
    with pytest.raises(ValueError, match=f"{wanted.__name__}.save.* holds a {type(it).__name__}"):
        wanted.load(tmp_path / "it")


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Bound.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["pickle", "npy", "field", "rest"])
def test_nothing_in_a_file_is_executed(kind, tmp_path):
    path, left = tmp_path / "it", tmp_path / "left behind"
    harmful = np.array([Harmful(left)], dtype=object)
    path.write_bytes(
        {
            "pickle": lambda: pickle.dumps(Harmful(left)),
            "npy": lambda: npy(harmful),
            "field": lambda: npz(rest=rest(), **{**TERMS, "prior": harmful}),
            "rest": lambda: npz(rest=harmful, **TERMS),
        }[kind]()
    )
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Bound.load(path)
    assert not left.exists()
    content = np.load(path, allow_pickle=True)  # had it been allowed, it would have been
    if kind in ("field", "rest"):
        with content:
            _ = content["prior" if kind == "field" else "rest"]
    assert left.exists()
