"""Draws belong to the seed, the datum's position, t and the particle: not to the memory, the network or the batches."""

import math
from collections import Counter
from datetime import timedelta

import numpy as np
import parted
import pyro.distributions as dist
import pytest
import torch
from exact import far, gaussian_diffusion
from test_context import shared, step_of
from torch import nn
from torch.utils.data import DataLoader

import pyrodiff
from pyrodiff import bound, importance_bound
from pyrodiff.likelihood import bounds
from pyrodiff.running.evaluation import bytes_per_row

T, D = 5, 2
SCHEDULE = pyrodiff.LinearSchedule(T, 0.05, 0.4)
ALPHA_BAR = np.cumprod([1 - (0.05 + 0.35 * k / (T - 1)) for k in range(T)])
ROWS = 2**12  # in a block, so that few data fill several
APART = 100.0  # between neighbouring data, far more than the noise


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """Yields the number of rows that blocks have outside of these tests."""
    rows = bounds._ROWS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "_ROWS", ROWS)
        yield rows


class Seen(nn.Module):
    """A network of two layers that keeps what it is called with, and what it returns."""

    def __init__(self, width=3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, width), nn.Tanh(), nn.Linear(width, D))
        self.rows, self.dtypes = [], set()

    def forward(self, x_t, t):
        self.rows.append((t.clone(), x_t.clone()))
        found = self.layers(x_t)
        self.dtypes.add(found.dtype)
        return found


class StudentReverse(nn.Module):
    """A reverse process of one's own, whose KL nobody has registered, around a network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x_t, t):
        return dist.StudentT(4.0, 0.8 * x_t + 0.1 * self.network(x_t, t), 0.7).to_event(1)


def recorded(network=None, kind="gaussian", schedule=SCHEDULE, dtype=torch.float64):
    """A diffusion, and its network, which keeps what it sees."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        network = Seen() if network is None else network
    network = network.to(dtype)
    forward = pyrodiff.GaussianForward(schedule)
    student = kind == "student"
    reverse = (
        StudentReverse(network)
        if student
        else pyrodiff.GaussianReverse(forward, pyrodiff.DataPrediction(network, forward))
    )
    return pyrodiff.Diffusion(forward, reverse, (D,)), network


def apart(B, dtype=torch.float64):
    """Data that a state x_t tells apart, whatever its noise."""
    return APART * torch.arange(B, dtype=dtype)[:, None].expand(B, D)


def rows_of(network):
    """(t, x_t) of all rows, sorted; the first call, of one datum, is the look that is taken at the model."""
    rows = torch.cat([torch.cat([t[:, None].double(), x.double()], 1) for t, x in network.rows[1:]]).numpy()
    network.rows.clear()
    return rows[np.lexsort(rows.T[::-1])]


def seen(evaluate, diffusion, network, x_0, **options):
    """What the network sees."""
    network.rows.clear()
    evaluate(diffusion, x_0, **options)
    return rows_of(network)


def positions(rows):
    """Which datum each row is of."""
    t = rows[:, 0].astype(int)
    return np.rint(rows[:, 1:].mean(1) / APART / np.sqrt(ALPHA_BAR)[t - 1]).astype(int)


def noise(rows):
    """The noise of each row, with shape (N, D)."""
    t, i = rows[:, 0].astype(int), positions(rows)
    alpha_bar = ALPHA_BAR[t - 1][:, None]
    return (rows[:, 1:] - np.sqrt(alpha_bar) * APART * i[:, None]) / np.sqrt(1 - alpha_bar)


def row_bytes(diffusion, x_0):
    return bytes_per_row(diffusion, x_0[:1])


BOUNDS = {
    "all times": (bound, {"num_particles": 2}),
    "some times": (bound, {"num_particles": 2, "num_times": 2}),
    "one time": (bound, {"num_times": 1}),
    "importance": (importance_bound, {"num_particles": 4}),
}
every_bound = pytest.mark.parametrize("evaluate", BOUNDS.values(), ids=BOUNDS)
every_kind = pytest.mark.parametrize("kind", ["gaussian", "student"])


# What a network sees, to the last bit


@every_bound
@every_kind
def test_the_states_are_the_same_whatever_the_memory_the_network_and_the_batches(evaluate, kind):
    """More data than one block has: a block of all times is of 1024 data, one of four trajectories as well."""
    evaluate, options = evaluate
    x_0, options = apart(1500), {**options, "generator": 7}
    diffusion, network = recorded(kind=kind)
    whole = seen(evaluate, diffusion, network, x_0, **options)
    number = options.get("num_particles", 1) * 1500 * (1 + options.get("num_times", T - 1))
    assert len(whole) == number
    assert set(positions(whole)) == set(range(1500))
    row = row_bytes(diffusion, x_0)
    for rows in (300, 1024):
        assert np.array_equal(seen(evaluate, diffusion, network, x_0, memory_budget=rows * row, **options), whole)
    for size in (97, 700, 1024, 1499):
        assert np.array_equal(seen(evaluate, diffusion, network, list(x_0.split(size)), **options), whole)
    loader = DataLoader(torch.utils.data.TensorDataset(x_0), batch_size=333)
    assert np.array_equal(seen(evaluate, diffusion, network, loader, **options), whole)
    for other in (recorded(Seen(200), kind), recorded(Seen(1), "gaussian"), recorded(Seen(2), "student")):
        assert np.array_equal(seen(evaluate, *other, x_0, **options), whole)


@every_bound
def test_the_states_are_the_same_whatever_data_follow(evaluate):
    evaluate, options = evaluate
    options = {**options, "generator": 8}
    diffusion, network = recorded()
    whole = seen(evaluate, diffusion, network, apart(1100), **options)
    for B in (1, 20, 1024, 1025):
        found = seen(evaluate, diffusion, network, apart(B), **options)
        assert np.array_equal(found, whole[positions(whole) < B])


@every_bound
def test_they_belong_to_the_position_and_not_to_what_the_datum_is(evaluate):
    """The noise that leads to the states; data of one batch are moved, and its noise is not."""
    evaluate, options = evaluate
    options = {**options, "generator": 9}
    diffusion, network = recorded()
    found = noise(seen(evaluate, diffusion, network, apart(30), **options))
    moved = seen(evaluate, diffusion, network, apart(30) + 10.0, **options)
    alpha_bar = ALPHA_BAR[moved[:, 0].astype(int) - 1][:, None]
    moved[:, 1:] -= 10.0 * np.sqrt(alpha_bar)
    np.testing.assert_allclose(noise(moved), found, rtol=0, atol=1e-9)


@every_bound
@every_kind
def test_the_states_are_the_same_under_autocast(evaluate, kind):
    evaluate, options = evaluate
    x_0, options = apart(40, torch.float32), {**options, "generator": 10}
    diffusion, network = recorded(kind=kind, dtype=torch.float32)
    whole = seen(evaluate, diffusion, network, x_0, **options)
    assert network.dtypes == {torch.float32}
    network.dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = seen(evaluate, diffusion, network, x_0, **options)
    assert network.dtypes == {torch.bfloat16}
    assert np.array_equal(found, whole)


@pytest.mark.parametrize("num_times", [None, 1, 3])
@every_kind
def test_the_first_particles_are_the_same_however_many_follow(num_times, kind):
    diffusion, network = recorded(kind=kind)
    options = {"num_times": num_times, "generator": 11}
    found = [seen(bound, diffusion, network, apart(30), num_particles=P, **options) for P in (1, 2, 5)]
    sets = [Counter(map(tuple, rows)) for rows in found]
    assert [sum(counts.values()) for counts in sets] == [P * len(found[0]) for P in (1, 2, 5)]
    assert all(max(counts.values()) == 1 for counts in sets)  # and no two particles are alike
    assert sets[0] <= sets[1] <= sets[2]


def test_other_times_belong_to_another_number_of_times():
    diffusion, network = recorded()
    drawn = {n: seen(bound, diffusion, network, apart(40), num_times=n, generator=12) for n in (1, 2, 3)}
    for n, rows in drawn.items():
        t, i = rows[:, 0].astype(int), positions(rows)
        per_datum = np.zeros((40, T + 1), dtype=int)
        np.add.at(per_datum, (i, t), 1)
        assert (per_datum[:, 1] == 1).all()
        assert (per_datum[:, 2:].sum(1) == n).all()
    later = [{tuple(row) for row in rows if row[0] > 1} for rows in drawn.values()]
    assert not any(later[k] & later[n] for k in range(3) for n in range(k))


@pytest.mark.parametrize("num_times", [None, 1, 4000])
def test_chains_longer_than_a_block_have_draws_of_the_same_kind(num_times):
    T = 5000
    diffusion, network = recorded(schedule=pyrodiff.LinearSchedule(T, 1e-4, 5e-3))
    x_0 = torch.full((3, D), 0.7, dtype=torch.float64)
    options = {"num_times": num_times, "generator": 13}
    whole = seen(bound, diffusion, network, x_0, **options)
    assert len(whole) == 3 * (1 + (num_times or T - 1))
    assert np.unique(whole[:, 1:]).size == whole[:, 1:].size
    row = row_bytes(diffusion, x_0)
    assert np.array_equal(seen(bound, diffusion, network, list(x_0.split(2)), memory_budget=99 * row, **options), whole)


@pytest.mark.parametrize("size", [2**17 + 1, 2**18 + 1])
def test_data_larger_than_half_a_block_have_draws_of_the_same_kind(size):
    """A block then has a row, and its x_t are those of the datum at any place in any batch."""
    forward = pyrodiff.GaussianForward(pyrodiff.BetaSchedule([0.2, 0.5]))

    class Kernel(nn.Module):
        def forward(self, x_t, t):
            return dist.Normal((3 * x_t).sin(), 0.8).to_event(1)

    diffusion = pyrodiff.Diffusion(forward, Kernel(), (size,))
    x_0 = torch.full((3, size), 0.4, dtype=torch.float64)
    whole = bound(diffusion, x_0, generator=14)
    parts = bound(diffusion, x_0.split(2), memory_budget=2 * row_bytes(diffusion, x_0), generator=14)
    torch.testing.assert_close(parts.nats, whole.nats, rtol=1e-12, atol=0)
    assert whole.nats.unique().numel() == 3


# What a bound says, to rounding


class Hashed(nn.Module):
    """Numbers that tell any two states apart, with so many outputs a number."""

    def __init__(self, size, outputs=None):
        super().__init__()
        weights = torch.arange(1.0, size * size + 1, dtype=torch.float64).reshape(size, size)
        self.register_buffer("weights", (7 * weights).sin())
        self.outputs = outputs

    def forward(self, x_t, t):
        found = (x_t @ self.weights + torch.as_tensor(t, dtype=x_t.dtype)[:, None]).sin()
        if self.outputs is None:
            return 2 * found
        return 2 * (found[..., None] * torch.arange(1.0, self.outputs + 1, dtype=x_t.dtype)).sin()


SIZE, LEVELS, STEPS = 6, 5, 4


def of_gaussians(reverse=None, prior=None, decoder=None):
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(STEPS, 4.0, -4.0))
    reverse = reverse or (lambda q: pyrodiff.GaussianReverse(q, pyrodiff.VelocityPrediction(Hashed(SIZE), q)))
    decoder = decoder and decoder(forward)
    return pyrodiff.Diffusion(forward, reverse(forward), (SIZE,), decoder=decoder, prior=prior)


def of_bits(kind=pyrodiff.BinomialReverse):
    forward = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(STEPS), 0.3)
    return pyrodiff.Diffusion(forward, kind(forward, pyrodiff.LogitPrediction(Hashed(SIZE), forward)), (SIZE,))


def of_levels(decoder):
    return of_gaussians(
        lambda q: pyrodiff.GaussianReverse(q, pyrodiff.LevelPrediction(Hashed(SIZE, LEVELS), q, LEVELS)),
        decoder=decoder,
    )


def student_prior():
    return dist.StudentT(5.0, torch.zeros(SIZE).double(), 1.1).to_event(1)


KINDS = {
    "gaussian": of_gaussians,
    "student": lambda: of_gaussians(lambda q: StudentReverse(Hashed(SIZE))),
    "a prior without a KL": lambda: of_gaussians(prior=student_prior()),
    "neither": lambda: of_gaussians(lambda q: StudentReverse(Hashed(SIZE)), prior=student_prior()),
    "bits": of_bits,
    "bits, D3PM": lambda: of_bits(pyrodiff.D3PMReverse),
    "levels, discretized": lambda: of_levels(lambda q: pyrodiff.DiscretizedDecoder(LEVELS)),
    "levels, softmax": lambda: of_levels(lambda q: pyrodiff.SoftmaxDecoder(q, LEVELS)),
}
every_diffusion = pytest.mark.parametrize("name", KINDS)


def data_for(name, B):
    k = torch.arange(B * SIZE).reshape(B, SIZE)
    if "bits" in name:
        return ((5 * k**2) % 7 % 2).double()
    return pyrodiff.from_levels((5 * k**2) % 7 % LEVELS, levels=LEVELS, dtype=torch.float64)


def terms(result):
    """All terms, with shape (T + 1, B), or the log weights, with shape (K, B)."""
    if isinstance(result, pyrodiff.ImportanceBound):
        return result.log_weights
    return torch.cat([result.prior[None], result.denoising, result.reconstruction[None]])


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every_bound
@every_diffusion
def test_every_term_is_the_same_whatever_the_memory_the_batches_and_the_data_that_follow(evaluate, name):
    evaluate, options = evaluate
    diffusion, x_0, options = KINDS[name](), data_for(name, 14), {**options, "generator": 15}
    whole = terms(evaluate(diffusion, x_0, **options))
    later = whole[1:-1] if evaluate is bound else whole
    assert later[later != 0].unique().numel() > 0.9 * (later != 0).sum()  # no two rows are alike, so terms tell them
    row = row_bytes(diffusion, x_0)
    for rows in (3, 40):
        close(terms(evaluate(diffusion, x_0, memory_budget=rows * row, **options)), whole)
    for size in (3, 13):
        close(terms(evaluate(diffusion, list(x_0.split(size)), **options)), whole)
    for B in (1, 9):
        close(terms(evaluate(diffusion, x_0[:B], **options)), whole[:, :B])
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        close(terms(evaluate(diffusion, x_0, **options)), whole)
    assert not torch.allclose(terms(evaluate(diffusion, x_0, **{**options, "generator": 16})), whole)


@every_bound
@pytest.mark.parametrize("name", [name for name, make in KINDS.items() if make().model.prior is None])
def test_half_precision_of_a_network_moves_terms_by_its_rounding_alone(evaluate, name):
    """In float32: were the states others, terms would differ by as much as those of two seeds do."""
    evaluate, options = evaluate
    diffusion, x_0 = KINDS[name]().float(), data_for(name, 50).float()

    def nats(seed, autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = evaluate(diffusion, x_0, generator=seed, **options)
        return terms(result).double()

    one, half, other = nats(17), nats(17, True), nats(18)
    assert (half - one).norm() < 0.2 * (other - one).norm()


@pytest.mark.parametrize("kind", [pyrodiff.BinomialReverse, pyrodiff.D3PMReverse])
def test_the_first_particles_of_bits_are_the_same_however_many_follow(kind):
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule([0.1, 0.2, 0.4]), 0.3)
    network = Seen().double()
    diffusion = pyrodiff.Diffusion(forward, kind(forward, pyrodiff.LogitPrediction(network, forward)), (D,))
    x_0 = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(50, D)
    found = [seen(bound, diffusion, network, x_0, num_particles=P, generator=19) for P in (1, 2, 4)]
    counts = [Counter(map(tuple, rows)) for rows in found]
    assert counts[0] <= counts[1] <= counts[2]
    assert sum(counts[2].values()) == 4 * sum(counts[0].values()) == 4 * 3 * 50


@pytest.mark.parametrize("name", ["gaussian", "neither"])
def test_the_mean_over_particles_has_the_first_ones_in_it(name):
    """Of P particles the terms are means, so the differences of P times these are the terms of one particle."""
    diffusion, x_0 = KINDS[name](), data_for(name, 200)
    sums = [P * terms(bound(diffusion, x_0, num_particles=P, generator=20)).sum(0) for P in (1, 2, 3)]
    one_by_one = [sums[0], sums[1] - sums[0], sums[2] - sums[1]]
    for k in range(3):
        for n in range(k):
            assert (one_by_one[k] - one_by_one[n]).abs().min() > 0
            assert not far(one_by_one[k] - one_by_one[n], 0.0)  # they have one mean
    assert float(sums[1].var() / 4) < float(sums[0].var())


def test_one_step_in_all():
    """T = 1: there is no denoising term, and the states are those of the seed."""
    m, v = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
    diffusion = gaussian_diffusion(pyrodiff.BetaSchedule([0.4]), m, v)
    x_0 = torch.tensor([[1.0, 2.0]]).double().expand(3000, D)
    density = -float(dist.Normal(m, v.sqrt()).to_event(1).log_prob(x_0[0]))
    whole = bound(diffusion, x_0, num_particles=2, generator=21)
    assert whole.denoising.shape == (0, 3000)
    assert whole.reconstruction.unique().numel() == 3000
    assert not far(whole.nats, density)  # exact kernels leave no gap
    close(terms(bound(diffusion, list(x_0.split(999)), num_particles=2, generator=21)), terms(whole))
    weights = importance_bound(diffusion, x_0, num_particles=2, generator=21).log_weights
    close(weights, torch.full((2, 3000), -density, dtype=torch.float64))  # and each single weight is the likelihood
    with_one = bound(diffusion, x_0, generator=21).reconstruction
    other = 2 * whole.reconstruction - with_one
    assert (other - with_one).abs().min() > 0
    assert not far((with_one - with_one.mean()) * (other - other.mean()), 0.0)


# What it is good for


def test_the_difference_of_two_models_varies_far_less_than_either():
    m, v = torch.tensor([0.7, -1.3]).double(), torch.tensor([0.3, 1.7]).double()
    x_0 = torch.tensor([[1.0, 2.0]]).double().expand(4000, D)
    models = [gaussian_diffusion(SCHEDULE, m, v, shift, widen) for shift, widen in ((0.3, 1.4), (0.32, 1.38))]
    for evaluate in (
        lambda model, seed: bound(model, x_0, generator=seed).nats,
        lambda model, seed: importance_bound(model, x_0, num_particles=2, generator=seed).log_weights[0],
    ):
        one, paired = (evaluate(model, 22) for model in models)
        apart_ = evaluate(models[1], 23)
        total = float(one.var() + paired.var())
        assert float((one - paired).var()) < 0.02 * total
        products = (one - one.mean()) * (apart_ - apart_.mean())
        assert not far(products, 0.0)  # with two seeds there is no covariance: the variances add up


# The draws are what they are said to be


def table(P=2, B=3000, seed=24):
    """The noise of each row in its place, with shape (T, B, P, D), from more rows than several blocks have."""
    diffusion, network = recorded()
    found = np.zeros((T, B, P, D))
    before = Counter()
    for particle in range(P):
        rows = seen(bound, diffusion, network, apart(B), num_particles=particle + 1, generator=seed)
        fresh = np.array(list((Counter(map(tuple, rows)) - before).elements()))
        before = Counter(map(tuple, rows))
        assert len(fresh) == T * B
        found[fresh[:, 0].astype(int) - 1, positions(fresh), particle] = noise(fresh)
    return torch.from_numpy(found)


@pytest.fixture(scope="module")
def drawn():
    return table()


def test_the_noise_has_the_law_that_it_should(drawn):
    for eps in (drawn, *drawn, *drawn.unbind(2), *drawn.unbind(3), *drawn.split(1000, 1)):
        for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
            assert not far(eps.flatten() ** power, float(moment))
    ordered = drawn.flatten().sort().values
    n = len(ordered)
    assert n == 5 * 3000 * 2 * 2
    law = dist.Normal(torch.zeros(()).double(), 1.0)
    assert (law.cdf(ordered) - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n) < 1.95  # Kolmogorov, Smirnov


def independent(one, other):
    """Whether neither the numbers nor their squares are correlated."""
    one, other = one.flatten(), other.flatten()
    return not far(one * other, 0.0) and not far((one**2 - 1) * (other**2 - 1), 0.0)


def test_no_two_of_data_times_particles_and_blocks_share_noise(drawn):
    for t in range(T):
        for s in range(t):
            assert independent(drawn[t], drawn[s])
            assert independent(drawn[t, 1:], drawn[s, :-1])
            assert independent(drawn[t, :-1], drawn[s, 1:])
    for lag in (1, 2, 3, 4, 5, 8, 64, 256, 1000, 1024, 2048):  # 1024 data are one block, but of t = 1
        assert independent(drawn[:, lag:], drawn[:, :-lag])
        assert independent(drawn[:, lag:, 0], drawn[:, :-lag, 1])
        assert independent(drawn[1:, lag:], drawn[:-1, :-lag])
    assert independent(drawn[:, :, 0], drawn[:, :, 1])
    assert independent(drawn[..., 0], drawn[..., 1])
    assert independent(drawn[:, :, 0, 0], drawn[:, :, 1, 1])
    flat = drawn[1:, :, 0].transpose(0, 1).flatten(0, 1)  # in the order of a block of all other times
    for block in range(2):
        assert independent(drawn[0, :3000, 0], flat[4096 * block : 4096 * block + 3000])
        assert independent(drawn[0, :3000, 1], flat[4096 * block : 4096 * block + 3000])


def test_other_seeds_give_other_draws(drawn):
    for seed in (25, 24 + 2**32, -24):
        assert independent(table(1, seed=seed)[:, :, 0], drawn[:, :, 0])


class KeptStudent(dist.StudentT):
    """A law that keeps what it scores."""

    kept: list = []  # noqa: RUF012

    def log_prob(self, value):
        self.kept.append(value)
        return super().log_prob(value)


def test_no_number_is_drawn_twice():
    """Of equal data, so that equal noise would be an equal state: over times, data, particles, L_T and two seeds."""
    x_0, P, B = torch.full((2100, D), 0.7, dtype=torch.float64), 2, 2100
    found = []
    for seed in (26, 27):
        diffusion, network = recorded()
        prior = KeptStudent(5.0, torch.zeros(D).double(), 1.2).to_event(1)
        diffusion = pyrodiff.Diffusion(diffusion.forward_process, diffusion.reverse, (D,), prior=prior)
        KeptStudent.kept.clear()
        rows = seen(bound, diffusion, network, x_0, num_particles=P, generator=seed)
        assert len(rows) == P * B * T
        alpha_bar = ALPHA_BAR[rows[:, 0].astype(int) - 1][:, None]
        found.append((rows[:, 1:] - np.sqrt(alpha_bar) * 0.7) / np.sqrt(1 - alpha_bar))
        x_T = torch.cat(KeptStudent.kept).numpy()
        found.append((x_T - math.sqrt(ALPHA_BAR[-1]) * 0.7) / math.sqrt(1 - ALPHA_BAR[-1]))
        assert len(x_T) >= P * B
    numbers = np.sort(np.concatenate(found).ravel())
    assert np.diff(numbers).min() > 1e-13  # rounding is a thousandth of that


@pytest.mark.parametrize(
    "evaluate", [bound, lambda *args, **kwargs: importance_bound(*args, num_particles=1, **kwargs)]
)
def test_no_number_is_drawn_twice_in_blocks_of_the_size_that_they_have(evaluate, small_blocks, monkeypatch):
    monkeypatch.setattr(bounds, "_ROWS", small_blocks)
    diffusion, network = recorded(schedule=pyrodiff.BetaSchedule([0.2, 0.5]))
    x_0 = torch.full((small_blocks + 99, D), 0.7, dtype=torch.float64)
    rows = seen(evaluate, diffusion, network, x_0, generator=33)
    assert len(rows) == 2 * len(x_0)
    for t in (1, 2):
        assert np.diff(np.sort(rows[rows[:, 0] == t][:, 1:].ravel())).min() > 0
    parts = seen(evaluate, diffusion, network, list(x_0.split(9999)), generator=33)
    assert np.array_equal(parts, rows)


def test_no_number_is_drawn_twice_on_trajectories():
    """The last states, of which each has noise of its own, and the first ones, given these."""
    x_0 = torch.full((700, D), 0.7, dtype=torch.float64)
    diffusion, network = recorded()
    rows = seen(importance_bound, diffusion, network, x_0, num_particles=9, generator=28)
    assert len(rows) == 700 * 9 * T
    for t in range(1, T + 1):
        states = np.sort(rows[rows[:, 0] == t][:, 1:].ravel())
        assert np.diff(states).min() > 1e-13
        alpha_bar = ALPHA_BAR[t - 1]
        eps = torch.from_numpy((states - math.sqrt(alpha_bar) * 0.7) / math.sqrt(1 - alpha_bar))
        for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
            assert not far(eps**power, float(moment))


def test_trajectories_are_independent_and_their_steps_are_the_chains():
    """Correlations of the noise of x_s and x_t are those of the chain, and 0 between data and particles."""
    diffusion, network = recorded()
    B, K = 1500, 3
    network.rows.clear()
    importance_bound(diffusion, apart(B), num_particles=K, generator=29)
    rows = np.concatenate([np.concatenate([t[:, None].numpy(), x.numpy()], 1) for t, x in network.rows[1:]])
    eps = torch.zeros(T, B, K, D).double()
    for t in range(1, T + 1):  # rows of one t are in one order, particle by particle, whatever t is
        at = rows[rows[:, 0] == t]
        i, found, number = positions(at), noise(at), Counter()
        for j, row in zip(i, found, strict=True):
            eps[t - 1, j, number[j]] = torch.from_numpy(row)
            number[j] += 1
        assert set(number.values()) == {K}
    for s in range(T):
        for t in range(s, T):
            snr = (ALPHA_BAR / (1 - ALPHA_BAR))[[s, t]]
            assert not far((eps[s] * eps[t]).flatten(), math.sqrt(snr[1] / snr[0]))
            assert independent(eps[s, :, 0], eps[t, :, 1])
            assert independent(eps[s, :, 2], eps[t, :, 1])
            for lag in (1, 2, 1000, 1365):  # 1365 data are one block
                assert not far((eps[s, lag:] * eps[t, :-lag]).flatten(), 0.0)


def test_bits_have_the_law_that_they_should():
    betas, rate = [0.1, 0.2, 0.4], 0.3
    forward = pyrodiff.BinomialForward(pyrodiff.BetaSchedule(betas), rate)
    network = Seen().double()
    reverse = pyrodiff.BinomialReverse(forward, pyrodiff.LogitPrediction(network, forward))
    diffusion = pyrodiff.Diffusion(forward, reverse, (D,))
    x_0 = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(5000, D)
    rows = torch.from_numpy(seen(bound, diffusion, network, x_0, num_particles=2, generator=30))
    alpha_bar = np.cumprod(1 - np.array(betas))
    for t in (1, 2, 3):
        x_t = rows[rows[:, 0] == t][:, 1:]
        assert len(x_t) == 10000
        expected = alpha_bar[t - 1] * x_0[0] + (1 - alpha_bar[t - 1]) * rate
        assert not far(x_t, expected)
        assert not far((x_t[:, 0] - expected[0]) * (x_t[:, 1] - expected[1]), 0.0)


# Two processes

JOBS = {
    "all times": lambda: (recorded(), bound, {"num_particles": 3}),
    "some times": lambda: (recorded(), bound, {"num_particles": 3, "num_times": 2}),
    "student": lambda: (recorded(kind="student"), bound, {"num_particles": 3}),
    "one block a batch": lambda: (recorded(), bound, {}),
}
SIZES = {"one block a batch": 1}  # of a batch; of the others 613


def job(name, sharded):
    """What the network of one process sees, and the terms that it has in the end."""
    (diffusion, network), evaluate, options = JOBS[name]()
    network.rows.clear()
    row = row_bytes(diffusion, apart(1))
    network.rows.clear()
    x_0 = list(apart(1100).split(613)) if name not in SIZES else list(apart(40).split(SIZES[name]))
    result = evaluate(diffusion, x_0, memory_budget=700 * row, generator=31, sharded=sharded, **options)
    return {"rows": torch.from_numpy(rows_of(network)), "terms": terms(result)}


def of_kind(name, sharded):
    return terms(bound(KINDS[name](), data_for(name, 50), num_particles=2, generator=32, sharded=sharded))


def work(rank, folder):
    """One process of two."""
    bounds._ROWS = ROWS
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    found = {name: job(name, sharded=True) for name in JOBS}
    found["kinds"] = {name: of_kind(name, sharded=True) for name in KINDS}
    found["labels"] = shared(sharded=True) | {"step": step_of(rank)}
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_find_the_same():
    """Each has a part of the rows, together they have all, and both have all terms; with labels, and steps, too."""
    found = parted.both(work)
    for name in JOBS:
        alone = job(name, sharded=False)
        (diffusion, network), evaluate, options = JOBS[name]()
        x_0 = apart(40 if name in SIZES else 1100)
        assert np.array_equal(seen(evaluate, diffusion, network, x_0, generator=31, **options), alone["rows"])
        rows = torch.cat([each[name]["rows"] for each in found]).numpy()
        assert all(0.2 * len(rows) < len(each[name]["rows"]) < 0.8 * len(rows) for each in found)
        assert np.array_equal(rows[np.lexsort(rows.T[::-1])], alone["rows"].numpy())
        for each in found:
            close(each[name]["terms"], alone["terms"])
    for name in KINDS:
        for each in found:
            close(each["kinds"][name], of_kind(name, sharded=False))
    alone = shared(sharded=False) | {"step": step_of(None)}
    for each in found:
        for name, value in alone.items():
            torch.testing.assert_close(each["labels"][name], value)
