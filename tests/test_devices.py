"""No value is read on the way, no device is mixed with another, and nothing global is asked: not the device or dtype.

torch's meta device stands in for an accelerator. It has shapes and no values: what reads one raises, and so does what
mixes devices, but for numbers without dimensions, which a mode looks for. Where it is said to have no float64 it stands
in for one that has none.
"""

import functools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from accelerator import tensors_in
from loops import sgd
from models import KINDS, SIZE, T
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyrodiff
from pyrodiff import datasets
from pyrodiff.command.plans import prepare

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def slowly(parameters):
    return sgd(parameters, lr=1e-3)


class Apart(TorchDispatchMode):
    """No operation is given tensors of two devices, unless it copies the one to the other.

    Arguments:
        has_float64: Whether the meta device may have float64.
        copies: Whether what is there can be copied to the CPU, where ones arrive; if not given, whether it has no
            float64, so that the times of a table are looked up on the CPU.
    """

    def __init__(self, has_float64: bool = True, copies: bool | None = None) -> None:
        super().__init__()
        self.has_float64, self.copies = has_float64, not has_float64 if copies is None else copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(tensors_in((*args, *kwargs.values())))
        if self.copies and func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to) and args[0].is_meta:
            options = [*args[1:], *kwargs.values()]
            if torch.device("cpu") in [one for one in options if isinstance(one, torch.device)]:
                dtypes = [one for one in options if isinstance(one, torch.dtype)]
                return torch.ones(args[0].shape, dtype=(dtypes or [args[0].dtype])[0], device="cpu")
        mixed = {tensor.device.type for tensor in given} >= {"cpu", "meta"}
        assert not mixed or func is torch.ops.aten.copy_.default, f"{func} of {[(t.shape, t.device) for t in given]}"
        results = func(*args, **kwargs)
        for tensor in tensors_in((results,)):
            doubled = tensor.is_meta and tensor.dtype == torch.float64
            assert self.has_float64 or not doubled, f"{func} makes float64 on a device that has none"
        return results


class Unfed(TorchFunctionMode):
    """Nothing is copied to an accelerator from Python's numbers or from the CPU, for which both would wait."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        makes = func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.to, torch.Tensor.copy_)
        given = tensors_in((*args, *(kwargs or {}).values()))
        was_there = any(tensor.is_meta for tensor in given) and func is not torch.Tensor.new_tensor
        assert not makes or was_there or not results.is_meta, f"{func} of {args}"
        return results


def elsewhere(kind):
    """A model and its data on the meta device; the model's tables are where they can be."""
    diffusion, pair = kind.pair()
    pair.to("meta")
    assert {parameter.device.type for parameter in pair.parameters()} == {"meta"}
    return diffusion, pair, kind.data().to("meta")


@pytest.fixture(params=[True, False], ids=["float64", "no float64"])
def has_float64(request, monkeypatch):
    """Whether the meta device is said to have float64."""
    if not request.param:
        monkeypatch.setattr("pyrodiff.base.precision.holds_float64", lambda device: device.type != "meta")
    with pyro.validation_enabled(False):
        yield request.param


def is_there(tensor, *shape):
    assert tensor.is_meta
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32


# The meta device, with and without float64


@every_kind
def test_the_programs_run_on_any_device(kind, has_float64):
    diffusion, pair, x_0 = elsewhere(kind)
    with Apart(has_float64):
        for one in dict.fromkeys((diffusion, pair)):
            one.model(x_0)  # which draws its own states; the guide is run below
            for term in pyrodiff.DiffusionELBO().terms(one.model, one.guide, x_0).values():
                is_there(term, 3)
            is_there(pyrodiff.DiffusionELBO().differentiable_loss(one.model, one.guide, x_0))
        is_there(diffusion.model(num_samples=3), 3, SIZE)


@every_kind
def test_bounds_and_samples_read_no_value(kind):
    """What comes out, with float64 and without, is in test_accelerator.py."""
    diffusion, _, x_0 = elsewhere(kind)
    with Apart(), pyro.validation_enabled(False):
        bound = pyrodiff.bound(diffusion, x_0, generator=1)
        is_there(bound.nats, 3)
        is_there(bound.denoising, T - 1, 3)
        is_there(pyrodiff.bound(diffusion, x_0, num_particles=2, num_times=1).nats, 3)
        is_there(pyrodiff.importance_bound(diffusion, x_0, num_particles=3).log_weights, 3, 3)
        is_there(pyrodiff.AncestralSampler(diffusion).trajectory(3), T + 1, 3, SIZE)


OPTIONS = {
    "accumulated and clipped": {"accumulate": 2, "clip_norm": 1.0},
    "autocast": {"autocast": torch.bfloat16},
    "averaged and scheduled": {
        "average": pyrodiff.exponential_average(),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    },
}


def takes_steps(pair, x_0, has_float64, **options):
    svi = pyrodiff.SVI(pair.model, pair.guide, slowly, pyrodiff.DiffusionELBO(), validate=False, **options)
    with Apart(has_float64):
        for _ in range(2 * svi.accumulate):
            is_there(svi.step(x_0))
    assert svi.num_steps == 2
    if has_float64:  # else times go to the table, on the CPU
        with Unfed():
            svi.step(x_0)
    for parameter in pair.parameters():
        assert parameter.grad is None or parameter.grad.is_meta


@every_kind
def test_steps_are_taken_on_any_device(kind, has_float64):
    _, pair, x_0 = elsewhere(kind)
    takes_steps(pair, x_0, has_float64)


@every_kind
def test_a_graph_of_a_step_reads_nothing_elsewhere(kind, interpreted):
    """No number of the CPU, which a CUDA graph would keep, and for which a step would not be captured."""
    _, pair, x_0 = elsewhere(kind)
    with pyro.validation_enabled(False):
        options = {"compile": True, "validate": False, "clip_norm": 5.0}
        svi = pyrodiff.SVI(pair.model, pair.guide, slowly, pyrodiff.DiffusionELBO(), **options)
        for _ in range(3):
            svi.step(x_0)
    (graph,) = svi._gradient.compiled._graphs.values()
    assert {tensor.device.type for tensor in graph.inputs} | {device.type for device in graph.draws_on} == {"meta"}
    assert not graph.changes_arguments


@pytest.mark.parametrize("name", ["MLP prediction", "bits of a sub-chain", "second moment drawing"])
@pytest.mark.parametrize("option", OPTIONS)
def test_steps_are_taken_on_any_device_with_every_option(option, name, has_float64):
    _, pair, x_0 = elsewhere(KINDS[name])
    takes_steps(pair, x_0, has_float64, **OPTIONS[option])


@every_kind
def test_tables_stay_in_float64_wherever_the_model_is(kind, has_float64):
    there, here = elsewhere(kind)[1], kind.pair()[1]
    for cast in (lambda module: module, torch.nn.Module.half, torch.nn.Module.float):
        state = cast(there).state_dict()
        exact = {name: value for name, value in here.state_dict().items() if value.dtype == torch.float64}
        assert exact
        for name, value in exact.items():
            assert state[name].dtype == torch.float64
            assert state[name].device.type == ("meta" if has_float64 else "cpu")
            assert has_float64 or torch.equal(state[name], value)


def test_a_prior_and_a_kernel_say_their_laws_on_any_device(has_float64):
    for name in ("linear schedule", "bits", "bits of a sub-chain"):
        diffusion, _, x_0 = elsewhere(KINDS[name])
        q = diffusion.forward_process
        with Apart(has_float64):
            for t in (2, np.int64(2), torch.full((3,), 2, device="meta")):
                for law in (
                    q.marginal(x_0, t),
                    q.transition(x_0, t),
                    q.posterior(x_0, x_0, t),
                    diffusion.reverse(x_0, t),
                ):
                    is_there(law.sample(), 3, SIZE)
            is_there(diffusion.model.top(torch.float32).sample(), SIZE)


@every_kind
def test_a_model_may_be_made_without_memory_and_filled(kind):
    real = kind.pair(other=True)[1]
    with torch.device("meta"):
        diffusion, pair = kind.pair()
    assert all(tensor.is_meta for tensor in (*pair.parameters(), *pair.buffers()))
    pair.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert pair.state_dict().keys() == real.state_dict().keys()
    for name, value in pair.state_dict().items():
        assert torch.equal(value, real.state_dict()[name])
    x_0 = kind.data()
    ours, theirs = (pyrodiff.bound(one, x_0, generator=1).nats for one in (diffusion, kind.pair(other=True)[0]))
    assert torch.equal(ours, theirs)
    losses = []
    for one in (pair, real):
        torch.manual_seed(3)
        losses.append(pyrodiff.SVI(one.model, one.guide, slowly, pyrodiff.DiffusionELBO()).step(x_0))
    assert torch.equal(*losses)


READINGS = {
    "digits": {"data": "digits"},
    "digits, strokes": {"data": "digits", "augment": "strokes"},
    "points": {"data": "swiss-roll"},
    "numbers": {"data": "numbers.npy"},
    "bits": {"data": "pictures.npy", "binarize": "threshold"},
    "bits, drawn once": {"data": "pictures.npy", "binarize": "static"},
    "bits, drawn anew": {"data": "pictures.npy", "binarize": "dynamic"},
    "levels, flipped": {"data": "pictures.npy", "augment": "flip"},
    "levels, streamed": {"data": "pictures.npy", "stream": True},
    "levels with labels": {"data": "labelled.npz", "labels": True},
}


@pytest.mark.parametrize("name", READINGS)
def test_the_command_draws_its_data_on_any_device(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = np.random.default_rng(0)
    pictures = source.integers(0, 256, size=(40, 8, 8)).astype(np.uint8)
    np.save("numbers.npy", source.normal(size=(40, 2)))
    np.save("pictures.npy", pictures)
    np.savez("labelled.npz", x=pictures, y=np.arange(40) % 3)
    _, data = prepare(READINGS[name], torch.device("meta"))
    with Apart(copies=True):
        drawn = next(data.drawn(6, 0, 0, 0))
        held_out = next(iter(data.batches("validation", 4)))
    assert len(drawn) == len(held_out) == (2 if name == "levels with labels" else 1)
    assert all(values.is_meta and len(values) == 6 for values in drawn)
    assert all(values.is_meta and len(values) == 4 for values in held_out)


# torch's default device and default dtype


class Strict(TorchFunctionMode):
    """What torch does where its default device is an accelerator: a source of the CPU does not draw there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source, device = kwargs.get("generator"), kwargs.get("device")
        makes = func in (torch.rand, torch.randn, torch.randint, torch.randperm)
        if makes and device is None and source is not None and source.device.type == "cpu":
            raise RuntimeError(f"{func.__name__}: expected a generator of the default device, but it is of the CPU")
        return func(*args, **kwargs)


def stepped(diffusion, pair, x_0):
    torch.manual_seed(8)
    svi = pyrodiff.SVI(pair.model, pair.guide, slowly, pyrodiff.DiffusionELBO(), clip_norm=10.0)
    losses = [svi.step(x_0) for _ in range(3)]
    return [*losses, *(parameter.detach().clone() for parameter in pair.parameters())]


def accounted(diffusion, pair, x_0):
    account = pyrodiff.variance_account(diffusion, x_0, num_particles=4, num_pairs=2, batch_size=4, generator=5)
    values = torch.tensor(list(account.value.values()), dtype=torch.float64, device="cpu")
    return [account.mean, account.std, values]


def generated(diffusion, pair, x_0):
    torch.manual_seed(9)
    return [diffusion.model(num_samples=4).detach()]


def verified(diffusion, pair, x_0):
    found = pyrodiff.verify(diffusion, x_0, num_repeats=10, num_particles=2, generator=7)
    wrong = [str(claim) for claim in found.claims if claim.passed is False and "Error" in claim.found]
    assert not wrong
    return []


ENTRIES = {
    "bound": lambda diffusion, pair, x_0: [pyrodiff.bound(diffusion, x_0, generator=1).nats],
    "bound of some times": lambda diffusion, pair, x_0: [
        pyrodiff.bound(diffusion, x_0, num_particles=2, num_times=1, generator=1).nats
    ],
    "importance_bound": lambda diffusion, pair, x_0: [
        pyrodiff.importance_bound(diffusion, x_0, num_particles=3, generator=1).nats
    ],
    "ode_log_prob": lambda diffusion, pair, x_0: [
        pyrodiff.ode_log_prob(diffusion, x_0, num_probes=1, generator=1, tolerance=1e-1).nats
    ],
    "variance_account": accounted,
    "verify": verified,
    "AncestralSampler": lambda diffusion, pair, x_0: [pyrodiff.AncestralSampler(diffusion)(4, generator=1)],
    "trajectory": lambda diffusion, pair, x_0: [pyrodiff.AncestralSampler(diffusion).trajectory(4, generator=1)],
    "SVI": stepped,
    "generation": generated,
}
SOME = ["levels, softmax", "bits of a sub-chain", "levels, discretized", "second moment drawing", "MLP prediction"]
SOME += ["simple weighting of a sub-chain", "transition decoder", "fixed variance of a sub-chain"]
CASES = [
    (entry, name)
    for entry in ENTRIES
    for name in (SOME[:2] if entry == "verify" else SOME)  # which takes its time
    if entry != "ode_log_prob" or KINDS[name].has_flow
]
every_case = pytest.mark.parametrize(("entry", "name"), CASES)


def entered(entry, name, parts=None):
    """What an entry point gives of a model that was made before, on the CPU and in float32."""
    kind = KINDS[name]
    diffusion, pair = parts or kind.pair()
    return ENTRIES[entry](diffusion, pair, kind.data())


@functools.cache
def expected(entry, name):
    """What an entry point gives where nothing is out of the ordinary; of ``verify`` nothing is compared."""
    return [] if entry == "verify" else entered(entry, name)


@every_case
def test_sources_of_the_cpu_draw_on_the_cpu(entry, name):
    with Strict():
        entered(entry, name)


@pytest.mark.parametrize(("entry", "name"), [case for case in CASES if case[0] != "variance_account"])
def test_a_model_stays_where_it_is_whatever_the_default_device(entry, name):
    """Where anything is made without a device, it would be without values. (The account makes its summary anywhere.)"""
    plain, parts = expected(entry, name), KINDS[name].pair()
    x_0 = KINDS[name].data()
    with torch.device("meta"), Apart(copies=entry == "verify"):
        found = ENTRIES[entry](*parts, x_0)
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@every_case
def test_a_model_keeps_its_dtype_whatever_the_default(entry, name):
    plain, parts = expected(entry, name), KINDS[name].pair()
    x_0 = KINDS[name].data()
    torch.set_default_dtype(torch.float64)  # set back by what every test starts from
    found = ENTRIES[entry](*parts, x_0)
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


K = torch.tensor([[0, 3], [4, 1], [2, 4]])
DATA = {
    "from_levels": lambda: pyrodiff.from_levels(K, 5),
    "from_levels with a generator": lambda: pyrodiff.from_levels(
        K, 5, True, generator=torch.Generator().manual_seed(1)
    ),
    "from_levels with a seed": lambda: pyrodiff.from_levels(K, 5, True, generator=1),
    "to_levels": lambda: pyrodiff.to_levels(K / 4.0, 5),
    "binarize with a generator": lambda: datasets.binarize(K, 5, generator=torch.Generator().manual_seed(1)),
    "binarize with a seed": lambda: datasets.binarize(K, 5, generator=1),
    "binarize by a threshold": lambda: datasets.binarize(K, 5, threshold=2),
    "swiss_roll": lambda: datasets.swiss_roll(20, seed=1),
    "checkerboard": lambda: datasets.checkerboard(20, seed=1),
    "eight_gaussians": lambda: datasets.eight_gaussians(20, seed=1),
    "heartbeat": lambda: datasets.heartbeat(20, seed=1),
    "digits": lambda: datasets.digits()[:5],
    "strokes": lambda: datasets.Strokes(datasets.digits()[:5])(torch.arange(3, device="cpu")),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("mode", [Strict, lambda: torch.device("meta")], ids=["strict", "meta"])
def test_data_are_the_same_whatever_the_default_device(mode, name):
    torch.manual_seed(3)
    expected = DATA[name]()
    torch.manual_seed(3)
    with mode():
        found = DATA[name]()
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("module", ["schedule", "variance", "drawing", "network", "rate"])
def test_what_is_made_under_a_default_device_is_there(module):
    with torch.device("meta"):
        made = {
            "schedule": lambda: pyrodiff.CosineSchedule(3),
            "variance": lambda: pyrodiff.FixedVariance([0.1, 0.2]),
            "drawing": lambda: pyrodiff.ImportanceDrawing([0.5, 0.5]),
            "network": lambda: pyrodiff.networks.MLP((2,), hidden=8),
            "rate": lambda: pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(3), 0.2),
        }[module]()
    assert all(tensor.is_meta for tensor in (*made.parameters(), *made.buffers()))
    assert repr(made)


# Numbers of NumPy


def table(schedule):
    t = torch.arange(schedule.num_steps + 1)
    return torch.stack([schedule.beta(t), schedule.signal(t), schedule.noise(t), schedule.log_snr(t)])


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def seeded(make):
    torch.manual_seed(5)
    return make()


def gaussian(name="MLP prediction"):
    return KINDS[name].pair()[0]


X_0 = KINDS["MLP prediction"].data()
FORWARD = pyrodiff.GaussianForward(pyrodiff.LinearSchedule(T, 0.25, 0.5))
BITS = pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(T), 0.25)
REVERSE = gaussian().reverse
NORMAL = dist.Normal(torch.zeros(3, SIZE), 0.5).to_event(1)
UNIFORMS = torch.linspace(0, 0.99, 7, dtype=torch.float64)


def account_of(i):
    account = pyrodiff.variance_account(
        gaussian(),
        X_0,
        drawings=None,
        num_particles=i(3),
        num_pairs=i(2),
        batch_size=i(4),
        memory_budget=i(2**28),
        generator=i(5),
    )
    return torch.cat([account.mean, account.std])


def steps_of(i, f):
    pair = KINDS["MLP prediction"].pair()[1]
    torch.manual_seed(4)
    average = pyrodiff.exponential_average(f(0.5))
    loss = pyrodiff.DiffusionELBO()
    svi = pyrodiff.SVI(pair.model, pair.guide, slowly, loss, f(0.5), accumulate=i(2), average=average)
    for _ in range(4):
        svi.step(X_0)
    return torch.cat([weights(pair), weights(svi.average.module)])


def verification_of(i):
    found = pyrodiff.verify(
        gaussian("bits"), KINDS["bits"].data(), num_repeats=i(10), num_particles=i(2), generator=i(3)
    )
    return torch.tensor([[ord(letter) for letter in str(found)]])


NUMBERS = {  # what is made of ints and floats, of any kind
    "LinearSchedule": lambda i, f: table(pyrodiff.LinearSchedule(i(4), f(0.25), f(0.5))),
    "CosineSchedule": lambda i, f: table(pyrodiff.CosineSchedule(i(4), f(0.125), f(0.5))),
    "ReciprocalSchedule": lambda i, f: table(pyrodiff.ReciprocalSchedule(i(4))),
    "GeometricSchedule": lambda i, f: table(pyrodiff.GeometricSchedule(i(4), f(0.25), f(8.0))),
    "LogSNRSchedule": lambda i, f: table(pyrodiff.LogSNRSchedule(i(4), f(4.0), f(-3.5))),
    "BetaSchedule": lambda i, f: table(pyrodiff.BetaSchedule([f(0.25), f(0.5)])),
    "SubSchedule": lambda i, f: table(pyrodiff.SubSchedule(FORWARD.schedule, [i(1), i(3)])),
    "methods of a schedule": lambda i, f: torch.stack(
        [*FORWARD.schedule.step(i(3), i(1)), *FORWARD.schedule.posterior(i(3), i(1)), *FORWARD.schedule.posterior(i(3))]
    ),
    "methods of a sub-schedule": lambda i, f: (
        table(pyrodiff.SubSchedule(FORWARD.schedule, (1, 3)))[:, i(2)]
        + pyrodiff.SubSchedule(FORWARD.schedule, (1, 3)).beta(i(2))
    ),
    "a rate": lambda i, f: pyrodiff.BinomialForward(pyrodiff.ReciprocalSchedule(4), f(0.25)).rate,
    "FixedVariance": lambda i, f: pyrodiff.FixedVariance([f(0.25), f(0.5)]).variances,
    "variances at t": lambda i, f: torch.stack(
        [
            variance(FORWARD, i(t))
            for t in (1, 2)
            for variance in (
                pyrodiff.ForwardVariance(),
                pyrodiff.PosteriorVariance(),
                pyrodiff.FixedLargeVariance(),
                pyrodiff.FixedVariance([0.25] * T),
            )
        ]
    ),
    "kernels at t": lambda i, f: torch.stack(
        [
            FORWARD.marginal(X_0, i(2)).mean,
            FORWARD.transition(X_0, i(3)).mean,
            FORWARD.transition(X_0, i(3), i(1)).mean,
            FORWARD.posterior(X_0, X_0, i(3), i(1)).mean,
            REVERSE(X_0, i(3)).mean,
            REVERSE(X_0, i(1)).variance,
            FORWARD.noise(X_0, X_0, i(2)),
            FORWARD.score(X_0, X_0, i(2)),
            FORWARD.velocity(X_0, X_0, i(2)),
        ]
    ).detach(),
    "kernels of bits at t": lambda i, f: torch.stack(
        [
            BITS.marginal(X_0.abs().round(), i(2)).mean,
            BITS.transition(X_0.abs().round(), i(3), i(1)).mean,
            BITS.posterior(X_0.abs().round(), X_0.abs().round(), i(3), i(1)).mean,
            gaussian("bits").reverse(X_0.abs().round(), i(1)).mean,
            gaussian("bits, D3PM").reverse(X_0.abs().round(), i(1)).mean,
        ]
    ).detach(),
    "MLP": lambda i, f: weights(seeded(lambda: pyrodiff.networks.MLP((i(2), i(3)), i(8), i(2), f(0.25), f(2.0)))),
    "UNet": lambda i, f: weights(seeded(lambda: pyrodiff.networks.UNet((i(8), i(8)), channels=(i(8), i(8))))),
    "TimeEmbedding": lambda i, f: weights(seeded(lambda: pyrodiff.networks.TimeEmbedding(i(8)))),
    "a network at t": lambda i, f: REVERSE.denoiser.network(X_0, i(2)).detach(),
    "decoders": lambda i, f: torch.stack(
        [
            decoder(NORMAL, X_0).log_prob(X_0)
            for decoder in (pyrodiff.DiscretizedDecoder(i(5)), pyrodiff.SoftmaxDecoder(FORWARD, i(5)))
        ]
    ),
    "LevelPrediction": lambda i, f: pyrodiff.LevelPrediction(
        KINDS["levels, discretized"].pair()[0].reverse.denoiser.network, FORWARD, i(5)
    )(X_0, i(2)).detach(),
    "bin_width": lambda i, f: torch.tensor(pyrodiff.bin_width(i(5))),
    "from_levels": lambda i, f: pyrodiff.from_levels(K, i(5), True, generator=i(3)),
    "to_levels": lambda i, f: pyrodiff.to_levels(X_0, i(5)),
    "binarize": lambda i, f: torch.cat([datasets.binarize(K, i(5), generator=i(2)), datasets.binarize(K, i(5), i(2))]),
    "swiss_roll": lambda i, f: datasets.swiss_roll(i(5), i(2), f(0.25)),
    "heartbeat": lambda i, f: datasets.heartbeat(i(5), i(2), i(8), i(4)),
    "checkerboard": lambda i, f: datasets.checkerboard(i(5), i(2)),
    "eight_gaussians": lambda i, f: datasets.eight_gaussians(i(5), i(2)),
    "ImportanceDrawing": lambda i, f: torch.stack(pyrodiff.ImportanceDrawing([f(0.25), f(0.75)])(UNIFORMS, i(2))),
    "ImportanceDrawing.of": lambda i, f: pyrodiff.ImportanceDrawing.of([f(1.0), f(4.0)], f(0.25)).probabilities,
    "LossSecondMoment": lambda i, f: torch.stack(pyrodiff.LossSecondMoment(i(4), i(2), f(0.25))(UNIFORMS, i(4))),
    "UniformDrawing": lambda i, f: torch.stack(pyrodiff.UniformDrawing()(UNIFORMS, i(4))),
    "LowDiscrepancyDrawing": lambda i, f: torch.stack(pyrodiff.LowDiscrepancyDrawing()(UNIFORMS, i(4))),
    "event_shape": lambda i, f: (
        pyrodiff.bound(pyrodiff.Diffusion(REVERSE.forward_process, REVERSE, (i(2),)), X_0, generator=2).nats
    ),
    "subchain": lambda i, f: pyrodiff.bound(gaussian().subchain((i(1), i(3))), X_0, generator=2).nats,
    "model": lambda i, f: seeded(lambda: gaussian().model(num_samples=i(3))).detach(),
    "bound": lambda i, f: (
        pyrodiff.bound(gaussian(), X_0, num_particles=i(2), memory_budget=i(2**28), num_times=i(1), generator=i(7)).nats
    ),
    "importance_bound": lambda i, f: pyrodiff.importance_bound(
        gaussian(), X_0, num_particles=i(4), memory_budget=i(2**28), generator=i(7)
    ).at(i(2)),
    "ode_log_prob": lambda i, f: (
        pyrodiff.ode_log_prob(
            gaussian(),
            X_0,
            num_probes=i(1),
            num_particles=None,
            tolerance=f(0.125),
            max_steps=i(500),
            memory_budget=i(2**28),
            generator=i(2),
        ).nats
    ),
    "rescaled": lambda i, f: pyrodiff.bound(gaussian(), X_0, generator=1).rescaled(f(0.25)).nats,
    "bits_per_dim_in_bins": lambda i, f: pyrodiff.bound(gaussian(), X_0, generator=1).bits_per_dim_in_bins(
        width=f(0.5)
    ),
    "AncestralSampler": lambda i, f: pyrodiff.AncestralSampler(gaussian())(i(3), generator=i(2)),
    "trajectory": lambda i, f: pyrodiff.AncestralSampler(gaussian()).trajectory(
        i(3), times=(i(3), i(0)), generator=i(2)
    ),
    "verify": lambda i, f: verification_of(i),
    "variance_account": lambda i, f: account_of(i),
    "SVI": steps_of,
}


KINDS_OF_NUMBERS = {
    "64 bits": (np.int64, np.float64),
    "32 bits": (np.int32, np.float32),
    "arrays": (np.array, np.array),
    "tensors": (torch.tensor, functools.partial(torch.tensor, dtype=torch.float64)),
}


@functools.cache
def of_pythons_numbers(name):
    return NUMBERS[name](int, float)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kinds", KINDS_OF_NUMBERS.values(), ids=KINDS_OF_NUMBERS)
def test_numbers_of_numpy_and_tensors_without_dimensions_are_numbers(kinds, name):
    plain, found = of_pythons_numbers(name), NUMBERS[name](*kinds)
    assert found.dtype == plain.dtype
    assert torch.equal(found, plain)


# Half precision

REFUSING = {
    "model": lambda diffusion, x_0: diffusion.model(x_0),
    "generation": lambda diffusion, x_0: diffusion.model(num_samples=2),
    "one-step model": lambda diffusion, x_0: diffusion.one_step().model(x_0),
    "bound": pyrodiff.bound,
    "importance_bound": lambda diffusion, x_0: pyrodiff.importance_bound(diffusion, x_0, num_particles=2),
    "ode_log_prob": pyrodiff.ode_log_prob,
    "verify": pyrodiff.verify,
    "variance_account": pyrodiff.variance_account,
    "AncestralSampler": lambda diffusion, x_0: pyrodiff.AncestralSampler(diffusion)(2),
    "trajectory": lambda diffusion, x_0: pyrodiff.AncestralSampler(diffusion).trajectory(2),
    "SVI": lambda diffusion, x_0: pyrodiff.SVI(diffusion.model, diffusion.guide, sgd, pyrodiff.DiffusionELBO()).step(
        x_0
    ),
    "SVI of one step": lambda diffusion, x_0: pyrodiff.SVI(
        diffusion.one_step().model, diffusion.one_step().guide, sgd, pyrodiff.DiffusionELBO()
    ).step(x_0),
}


def said(call, *args):
    """What is refused first, the weights or the data, and the words about it."""
    with pytest.raises(ValueError, match="autocast") as error:
        call(*args)
    name, words = str(error.value).split(" must be ")
    return name, words


@pytest.mark.parametrize("kind", ["MLP prediction", "bits", "levels, discretized"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("data_dtype", ["its own", torch.float32])
def test_half_precision_is_refused_in_the_same_words(data_dtype, dtype, kind):
    diffusion, x_0 = gaussian(kind).to(dtype), KINDS[kind].data()
    x_0 = x_0.to(dtype if data_dtype == "its own" else data_dtype)
    calls = {name: call for name, call in REFUSING.items() if kind != "bits" or name != "ode_log_prob"}
    found = {name: said(call, diffusion, x_0) for name, call in calls.items()}
    for name in ("guide", "one-step guide"):  # which have no weights to look at
        guide = diffusion.guide if name == "guide" else diffusion.one_step().guide
        found[name] = said(guide, x_0.to(dtype))
        assert found[name][0] == "x_0"
    for name in REFUSING.keys() - {"SVI", "SVI of one step"}:
        assert found.get(name, found["bound"]) == found["bound"], name
    assert found["bound"][0] == "weights"
    (words,) = {words for _, words in found.values()}
    assert str(dtype) in words
    assert "SVI(..., autocast=torch.bfloat16)" in words
