"""What a network is told of a datum, a label or a vector: against a network without, which is told the sum by hand."""

import copy

import pyro
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import pyrodiff
from pyrodiff.networks import MLP, ContextEmbedding, LogSNREmbedding, UNet
from pyrodiff.running.compilation import Compiled

KINDS = {
    "U-Net": lambda **options: UNet((4, 4), (2, 4), **{"hidden": 8, "dropout": 0.0, **options}),
    "MLP": lambda **options: MLP((4, 4), hidden=8, **options),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
OPTIONS = [{"classes": 3}, {"vector": 2}, {"classes": 3, "vector": 2}]
every_context = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " and ".join(options))
Y = torch.tensor([0, 2, 1, -1, 0, 1])
V = torch.tensor([[0.5, -1.0], [2.0, 0.3], [-0.7, 1.1], [0.0, 0.4], [1.5, 1.5], [-2.0, 0.9]], dtype=torch.float64)


def made(kind, **options):
    """A network in float64, none of whose parameters is at the zeros that training starts from."""
    network = KINDS[kind](**options).double().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def of(options, batch_shape=(6,)):
    """The context that a network made with these options is told."""
    everything = {"classes": Y.reshape(batch_shape), "vector": V.reshape(*batch_shape, 2)}
    return [everything[name] for name in options]


def states(*batch_shape):
    return torch.randn(*batch_shape, 4, 4, dtype=torch.float64) + 0.5


class Told(nn.Module):
    """The features of a time, and others added."""

    def __init__(self, time, features):
        super().__init__()
        self.time, self.added, self.features = time, features, time.features

    def forward(self, t):
        return self.time(t) + self.added


@every_kind
@every_context
def test_context_is_added_to_the_embedded_time(kind, options):
    """A row of the table for a label, the one before all for none, and each number of a vector times a column."""
    network, x, t = made(kind, **options), states(6), torch.arange(1, 7)
    expected = torch.zeros(6, network.embedding[0].features, dtype=torch.float64)
    for i in range(6):
        if "classes" in options:
            expected[i] += network.labels.embedding.weight[1 + int(Y[i])].detach()
        if "vector" in options:
            expected[i] += sum(float(V[i, j]) * network.labels.linear.weight[:, j].detach() for j in range(2))
    network = network.requires_grad_(False)
    assert (expected.abs().amin(1) > 0).all()
    output = network(x, t, *of(options))
    plain = copy.deepcopy(network)
    plain.labels, plain.embedding[0] = ContextEmbedding(1), Told(plain.embedding[0], expected)
    torch.testing.assert_close(output, plain(x, t))
    assert not torch.allclose(output[3], output[4])


@every_kind
@every_context
@pytest.mark.parametrize("batch_shape", [(6,), (2, 3), (3, 2)])
def test_each_datum_is_told_its_own_context(kind, options, batch_shape):
    network, x, t = made(kind, **options), states(*batch_shape), torch.arange(1, 7).reshape(batch_shape)
    output = network(x, t, *of(options, batch_shape))
    assert output.shape == x.shape
    for i, one in enumerate(x.reshape(6, 1, 4, 4)):
        alone = network(one, i + 1, *(each[i : i + 1] for each in of(options)))
        torch.testing.assert_close(output.reshape(6, 4, 4)[i : i + 1], alone)


@every_kind
@pytest.mark.parametrize("t", [5, torch.tensor([[5, 1, 2], [3, 4, 5]])], ids=["int", "tensor"])
def test_context_of_a_part_of_the_batch_is_that_of_all(kind, t):
    network, x = made(kind, classes=3, vector=2), states(2, 3)
    labels = [2, torch.tensor(2), torch.tensor([2]), torch.tensor([0, -1, 1]), torch.tensor([[1], [0]])]
    vectors = [V[0], V[:1], V[:1], V[:3], V[3:5, None]]
    for y, vector in zip(labels, vectors, strict=True):
        whole = torch.as_tensor(y).expand(2, 3), vector.expand(2, 3, 2)
        torch.testing.assert_close(network(x, t, y, vector), network(x, t, *whole))


@every_kind
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_may_be_of_any_integer_dtype(kind, dtype):
    network, x = made(kind, classes=3), states(2)
    assert torch.equal(network(x, 5, torch.tensor([2, 0], dtype=dtype)), network(x, 5, torch.tensor([2, 0])))


@every_kind
def test_no_label_is_minus_one_and_differs_from_all(kind):
    network, x = made(kind, classes=3, vector=2), states(6)
    none = network(x, 5, -1, V)
    for y in (None, torch.full((6,), -1)):
        assert torch.equal(network(x, 5, y, V), none)
    assert all((network(x, 5, y, V) != none).any(-1).any(-1).all() for y in range(3))
    assert torch.equal(network(x, 5, V, y=Y), network(x, 5, Y, V))
    network = made(kind, classes=3)
    assert torch.equal(network(x, 5), network(x, 5, -1))
    assert torch.equal(network(x, 5, y=Y), network(x, 5, Y))


@every_kind
@every_context
def test_context_has_no_effect_at_the_start_and_some_after_training(kind, options):
    with torch.random.fork_rng():
        plain = KINDS[kind]().double()
    network, x = KINDS[kind](**options).double(), states(6)
    context, others = of(options), [each.flip(0) for each in of(options)]
    for name, parameter in plain.named_parameters():  # the same, from the same seed
        assert torch.equal(parameter, network.get_parameter(name))
    for one in (network, plain):
        nn.init.constant_(one.outlet.weight, 0.1)
        for module in one.modules():  # which start at zero too
            if isinstance(module, nn.Linear) and module is not network.labels.linear and not module.weight.any():
                nn.init.constant_(module.weight, 0.1)
    torch.testing.assert_close(network(x, 5, *context), plain(x, 5))
    assert torch.equal(network(x, 5, *context), network(x, 5, *others))
    adam = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(3):
        adam.zero_grad()
        (network(x, 5, *context) - torch.arange(6)[:, None, None]).square().sum().backward()
        adam.step()
    assert not torch.allclose(network(x, 5, *context), network(x, 5, *others))


@every_kind
def test_gradients_reach_the_labels_that_were_seen_and_every_number_of_a_vector(kind):
    network = made(kind, classes=3, vector=2)
    network(states(6), 5, torch.tensor([0, 2, 0, 0, 2, 2]), V).square().sum().backward()
    assert (network.labels.embedding.weight.grad.abs().sum(1) > 0).tolist() == [False, True, False, True]
    assert (network.labels.linear.weight.grad.abs().sum(0) > 0).all()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


@every_kind
def test_the_state_of_a_network_without_context_has_nothing_of_it(kind):
    plain = {name: value.shape for name, value in KINDS[kind]().state_dict().items()}
    assert not [name for name in plain if "labels" in name]
    features = KINDS[kind]().embedding[0].features
    state = {name: value.shape for name, value in KINDS[kind](classes=3, vector=2).state_dict().items()}
    assert state == {**plain, "labels.embedding.weight": (4, features), "labels.linear.weight": (features, 2)}


# Devices, dtypes, graphs


@every_kind
@every_context
def test_a_network_without_storage_is_told_context(kind, options):
    with torch.device("meta"):
        network = KINDS[kind](**options)
    context = [each.to("meta") for each in of(options)]
    output = network(torch.empty(6, 4, 4, device="meta"), 3, *context)
    assert (output.shape, output.device.type) == ((6, 4, 4), "meta")


@every_kind
@every_context
def test_context_is_computed_in_the_network_s_precision(kind, options):
    network, x = made(kind, **options).requires_grad_(False), states(6)
    less = [each.float() if each.is_floating_point() else each for each in of(options)]
    exact = network(x, 5, *of(options))
    assert network(x, 5, *less).dtype == torch.float64
    torch.testing.assert_close(network(x, 5, *less), exact, rtol=1e-5, atol=1e-5)
    network = network.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = network(x.float(), 5, *of(options))
    torch.testing.assert_close(output.double(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("kind", "options", "batch_shape"),
    [
        ("MLP", OPTIONS[0], (6,)),
        ("MLP", OPTIONS[1], (2, 3)),
        ("MLP", OPTIONS[2], (2, 3)),
        ("U-Net", OPTIONS[2], (2, 3)),
    ],
)
def test_a_traced_network_is_told_the_context_of_each_call(kind, options, batch_shape):
    network, x = made(kind, **options).requires_grad_(False), states(*batch_shape)
    context, others = of(options, batch_shape), [each.flip(0) for each in of(options, batch_shape)]
    with pyro.validation_enabled(False):
        traced = make_fx(lambda x, *context: network(x, 5, *context))(x, *context)
        torch._dynamo.reset()  # which counts what it compiles of one source
        compiled = torch.compile(network, backend="eager", fullgraph=True)
    for told in (context, others):
        torch.testing.assert_close(traced(x, *told), network(x, 5, *told))
        with pyro.validation_enabled(False):
            torch.testing.assert_close(compiled(x, 5, *told), network(x, 5, *told))
    assert not torch.allclose(traced(x, *context), traced(x, *others))


def test_what_inductor_makes_of_a_context_is_exact(recwarn):
    embedding = ContextEmbedding(4, classes=3, vector=2).double()
    for parameter in embedding.parameters():
        nn.init.normal_(parameter)
    compiled = Compiled(lambda y, vector: (embedding((6,), y, vector),), [embedding])
    for y, vector in ((Y, V), (Y, V), (Y.flip(0), V + 1), (Y.clamp(max=0), 2 * V)):
        expected = embedding.embedding.weight[y + 1] + vector @ embedding.linear.weight.T
        torch.testing.assert_close(compiled(y, vector)[0], expected)
    assert compiled.made == 1
    assert not recwarn.list


# What is refused


@every_kind
@pytest.mark.parametrize(("y", "span"), [(Y + 1, "0..3"), (Y - 1, "-2..1")])
def test_labels_out_of_range_are_never_taken_for_others(kind, y, span):
    network = made(kind, classes=3)
    with pytest.raises(ValueError, match=f"y must be in 0..2, or -1 for no label, but it has values in {span}"):
        network(states(6), 1, y)
    with pyro.validation_enabled(False), pytest.raises(IndexError):
        network(states(6), 1, y)


# In a diffusion

X_0 = torch.linspace(-1, 2, 48, dtype=torch.float64).reshape(3, 4, 4)
LABELS = [torch.tensor(y) for y in ([0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 2, 1], [-1, 0, 0])]


def with_labels(kind, T=10):
    """A network of labels, told the log SNR if it is a U-Net, and a diffusion of it."""
    torch.manual_seed(0)
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(T))
    options = {"attention": (4,), "time": LogSNREmbedding(forward.schedule, 8)} if kind == "U-Net" else {}
    network = made(kind, classes=3, **options)
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(network, forward))
    return network, pyrodiff.Diffusion(forward, reverse, (4, 4))


def training(kind, labels, compiled):
    """The losses and the gradients of steps with the same draws."""
    pyro.clear_param_store()
    network, diffusion = with_labels(kind)
    pair, found = diffusion.one_step(), []
    still = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    svi = pyrodiff.SVI(pair.model, pair.guide, still, pyrodiff.DiffusionELBO(), compile=compiled)
    for y in labels:
        pyro.set_rng_seed(1)
        loss = svi.step(X_0, y)
        found.append((loss, [parameter.grad.clone() for parameter in network.parameters()]))
    return found


@every_kind
def test_a_graph_has_the_labels_that_are_arguments_of_the_step(kind, interpreted):
    found = training(kind, LABELS, compiled=True)
    assert len(interpreted) == 1
    torch.testing.assert_close(found, training(kind, LABELS, compiled=False))
    assert len({float(loss) for loss, _ in found[2:]}) == 3


@every_kind
def test_a_compiled_sampler_draws_of_the_label_that_is_given(kind, interpreted):
    _, diffusion = with_labels(kind, T=4)
    eager, compiled = pyrodiff.AncestralSampler(diffusion), pyrodiff.AncestralSampler(diffusion, compile=True)
    found = []
    for y in (0, 2, 1):
        found.append(compiled(3, torch.tensor([y]), generator=0))
        torch.testing.assert_close(found[-1], eager(3, torch.full((3,), y), generator=0))
    assert len(interpreted) == 1
    assert not torch.allclose(found[0], found[1])


@every_kind
def test_the_bound_of_a_class_is_that_of_its_label(kind):
    """The bound of labelled data is that of a network in which each label's row stands in the place of none."""
    network, diffusion = with_labels(kind, T=4)
    for y in range(3):
        fixed = copy.deepcopy(diffusion)
        fixed.reverse.denoiser.network.labels.embedding.weight.data[:] = network.labels.embedding.weight.data[y + 1]
        bound = pyrodiff.bound(diffusion, X_0, torch.tensor([y]), generator=0).nats
        torch.testing.assert_close(bound, pyrodiff.bound(fixed, X_0, generator=0).nats)
        assert not torch.allclose(bound, pyrodiff.bound(diffusion, X_0, generator=0).nats)
