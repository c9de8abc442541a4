"""The networks: shapes, the start, that the time matters, and each part against arithmetic by hand."""

import copy
import math

import pytest
import torch
from torch import nn

import pyrodiff
from pyrodiff.networks import MLP, LogSNREmbedding, Offset, TimeEmbedding, UNet


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("batch_shape", [(5,), (7, 5)])
def test_an_int_and_a_tensor_of_the_same_time_give_the_same_output(event_shape, batch_shape):
    network = MLP(event_shape, hidden=16).double()
    torch.nn.init.normal_(network.outlet.weight)
    x = torch.randn(batch_shape + event_shape, dtype=torch.float64)
    output = network(x, 3)
    assert output.shape == x.shape
    torch.testing.assert_close(network(x, torch.full(batch_shape, 3)), output)
    mixed = torch.arange(torch.Size(batch_shape).numel()).reshape(batch_shape)
    torch.testing.assert_close(
        network(x, mixed).flatten(0, -len(event_shape) - 1 or None)[3], network(x, 3).reshape(-1, *event_shape)[3]
    )
    assert not torch.allclose(network(x, 4), output)


def test_at_the_start_the_output_is_linear_in_the_state():
    network = MLP((3,), hidden=16).double()
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(network(2 * x + y, 3), 2 * network(x, 3) + network(y, 3))


def test_the_embedding_holds_sines_and_cosines_of_geometric_frequencies():
    embedding = TimeEmbedding(6).double()
    seen = []
    embedding.layers.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    embedding(torch.tensor([5]))
    angles = [5 * 10000 ** (-k / 3) for k in range(3)]
    expected = torch.tensor(
        [
            [torch.sin(torch.tensor(a, dtype=torch.float64)) for a in angles]
            + [torch.cos(torch.tensor(a, dtype=torch.float64)) for a in angles]
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(seen[0], expected, rtol=1e-6, atol=1e-6)


def test_without_a_frequency_there_are_no_sine_features():
    assert not any("sines" in name or "directions" in name for name, _ in MLP((3,), frequency=0.0).named_parameters())


def test_every_parameter_is_learned():
    network = MLP((3,), hidden=16)
    torch.nn.init.normal_(network.outlet.weight)
    network(torch.randn(5, 3), torch.tensor([1, 2, 3, 4, 5])).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_dropout_is_random_in_training_only():
    network = MLP((3,), hidden=16, dropout=0.5)
    torch.nn.init.normal_(network.outlet.weight)
    x = torch.randn(5, 3)
    assert not torch.equal(network(x, 1), network(x, 1))
    network.eval()
    assert torch.equal(network(x, 1), network(x, 1))


SHAPES = [((8, 8), (4, 6)), ((3, 8, 4), (4, 6, 8)), ((1, 5, 7), (4,))]


def unet(event_shape, channels, **kwargs):
    """A U-Net in float64, none of whose parameters is at the zeros that training starts from."""
    network = UNet(event_shape, channels, **{"hidden": 8, **kwargs}).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.mark.parametrize(("event_shape", "channels"), SHAPES)
@pytest.mark.parametrize("outputs", [None, 1, 5])
@pytest.mark.parametrize("batch_shape", [(6,), (2, 3)])
def test_a_picture_gives_a_picture_or_numbers_for_each_of_its_own(event_shape, channels, outputs, batch_shape):
    network = unet(event_shape, channels, outputs=outputs)
    x = torch.randn(batch_shape + event_shape, dtype=torch.float64)
    output = network(x, 3)
    assert output.shape == x.shape + (() if outputs is None else (outputs,))
    torch.testing.assert_close(network(x, torch.full(batch_shape, 3)), output)
    mixed = torch.arange(6).reshape(batch_shape)
    one_by_one = network(x.reshape(6, *event_shape)[4:5], 4)
    torch.testing.assert_close(network(x, mixed).reshape(6, *one_by_one.shape[1:])[4:5], one_by_one)
    assert not torch.allclose(network(x, 4), output)


def test_the_outputs_of_a_number_stay_with_its_plane():
    """With one plane's outlet zeroed, that plane's outputs are zero, all of them and no others."""
    network = unet((3, 4, 4), (4, 6), outputs=5)
    with torch.no_grad():
        network.outlet.weight[5:10], network.outlet.bias[5:10] = 0, 0
    output = network(torch.randn(2, 3, 4, 4, dtype=torch.float64), 1)
    assert output[:, 1].abs().max() == 0
    assert (output[:, [0, 2]].abs().amin((0, 2, 3)) > 0).all()


def test_every_pixel_sees_every_other_through_the_hidden_layer():
    for hidden, sees in ((8, True), (0, False)):
        network = UNet((32, 32), (4,), hidden=hidden).double()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        network.norm = torch.nn.Identity()  # which would spread a change too
        for block in (network.before[0][0], network.after[0][0]):
            block.norm = torch.nn.Identity()
        x = torch.zeros(1, 32, 32, dtype=torch.float64)
        changed = x.clone()
        changed[0, 0, 0] = 1
        off = (network.eval()(changed, 2) - network(x, 2)).abs()
        assert off[0, 0, 0] > 0
        assert bool(off[0, 31, 31] > 0) == sees


def test_a_u_net_starts_at_zero_and_learns_all_of_its_parameters():
    assert UNet((8, 8), (4, 6))(torch.randn(3, 8, 8), 5).abs().max() == 0
    network = unet((8, 8), (4, 6), outputs=3, num_blocks=2)
    network(torch.randn(5, 8, 8, dtype=torch.float64), torch.arange(1, 6)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_dropout_of_a_u_net_is_random_in_training_only():
    network = unet((8, 8), (4, 6), dropout=0.5)
    x = torch.randn(3, 8, 8, dtype=torch.float64)
    assert torch.equal(network(x, 1), network(x, 1))
    network.train()
    assert not torch.equal(network(x, 1), network(x, 1))


# Attention, groups, sizes


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_the_softmax_of_scaled_products_head_by_head(heads):
    attention = unet((2, 4), (6,), attention=(2,), heads=heads, groups=2).before[0][0].attention
    h = torch.randn(3, 6, 2, 4, dtype=torch.float64)
    output = attention(h)
    normed = nn.functional.group_norm(h, 2, attention.norm.weight, attention.norm.bias)
    size = 6 // heads
    for b in range(3):
        places = [normed[b, :, i, j] for i in range(2) for j in range(4)]
        projected = [attention.inlet.weight @ place + attention.inlet.bias for place in places]
        for i, asking in enumerate(projected):
            found = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = [asking[:6][part] @ asked[6:12][part] / math.sqrt(size) for asked in projected]
                weights = torch.stack(scores).softmax(0)
                found.append(sum(w * asked[12:][part] for w, asked in zip(weights, projected, strict=True)))
            expected = h[b, :, i // 4, i % 4] + attention.outlet.weight @ torch.cat(found) + attention.outlet.bias
            torch.testing.assert_close(output[b, :, i // 4, i % 4], expected)


def test_attention_stands_at_the_heights_that_are_named():
    network = UNet((8, 4), (4, 6, 8), attention=[8, 2], num_blocks=2)
    for blocks in (network.before, network.after):
        attends = [[block.attention is not None for block in size] for size in blocks]
        assert attends == [[True, True], [False, False], [True, True]]


def test_attention_lets_every_place_see_every_other():
    for attention, sees in (((32,), True), ((), False)):
        network = unet((32, 32), (4,), attention=attention, hidden=0)
        for module in network.modules():
            if hasattr(module, "norm"):  # which would spread a change too
                module.norm = nn.Identity()
        x = torch.zeros(1, 32, 32, dtype=torch.float64)
        changed = x.clone()
        changed[0, 0, 0] = 1
        assert bool((network(changed, 2) - network(x, 2))[0, 31, 31] != 0) == sees


PARTS = {"attention": (8, 4), "heads": 2, "classes": 3}


def test_attention_and_labels_change_nothing_at_the_start():
    """With all that the plain network has at random, what is added to it leaves its output as it is."""
    plain, network = unet((3, 8, 8), (4, 6)), UNet((3, 8, 8), (4, 6), hidden=8, **PARTS).double().eval()
    missing = network.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {key.split(".")[-3] for key in missing.missing_keys if "labels" not in key} == {"attention"}
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for y in (None, 0, torch.tensor([2, 1])):
        torch.testing.assert_close(network(x, 3, y), plain(x, 3))


def test_the_groups_are_normed_apart():
    network = unet((4, 4), (6,), groups=3, attention=(4,))
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    block = network.after[0][0]
    for norm in (network.norm, block.norm, block.attention.norm):
        groups = x.unflatten(1, (3, 2))
        off = groups - groups.mean((2, 3, 4), keepdim=True)
        normed = (off / (off.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).flatten(1, 2)
        torch.testing.assert_close(norm(x), normed * norm.weight[:, None, None] + norm.bias[:, None, None])


@pytest.mark.parametrize("event_shape", [(4, 8), (1, 4, 8), (3, 8, 4)])
@pytest.mark.parametrize("batch_shape", [(6,), (2, 3)])
def test_all_parts_together_take_any_picture_and_each_datum_by_itself(event_shape, batch_shape):
    network = unet(event_shape, (4, 6), attention=(4,), heads=2, groups=2, classes=3, outputs=2)
    x = torch.randn(batch_shape + event_shape, dtype=torch.float64)
    t, y = torch.arange(1, 7).reshape(batch_shape), torch.tensor([0, 1, 2, -1, 0, 1]).reshape(batch_shape)
    output = network(x, t, y)
    assert output.shape == (*x.shape, 2)
    assert output.dtype == torch.float64
    output = output.reshape(6, *event_shape, 2)
    for i, one in enumerate(x.reshape(6, 1, *event_shape)):
        torch.testing.assert_close(network(one, i + 1, int(y.flatten()[i])), output[i : i + 1])


def test_all_parts_together_learn_all_of_their_parameters():
    schedule = pyrodiff.LogSNRSchedule(5)
    network = unet((8, 8), (4, 6), groups=2, num_blocks=2, time=LogSNREmbedding(schedule, 6), **PARTS)
    x, t, y = torch.randn(5, 8, 8, dtype=torch.float64), torch.arange(1, 6), torch.tensor([0, 1, 2, -1, 0])
    network(x, t, y).square().sum().backward()
    for name, parameter in network.named_parameters():
        rows = parameter.grad.reshape(len(parameter), -1).abs().sum(1)
        assert (rows > 0).all() if "labels" in name else rows.sum() > 0, name


def test_a_u_net_that_starts_at_zero_learns_its_attention_and_its_labels():
    network = UNet((8, 8), (4, 6), hidden=0, dropout=0.0, **PARTS)
    adam, x = torch.optim.Adam(network.parameters(), lr=1e-2), torch.randn(5, 8, 8)
    before = copy.deepcopy(network.state_dict())
    for _ in range(10):
        adam.zero_grad()
        (network(x, 3, torch.tensor([0, 1, 2, -1, 0])) - torch.arange(5)[:, None, None]).square().sum().backward()
        adam.step()
    assert all((value != before[name]).any() for name, value in network.state_dict().items())
    assert not torch.allclose(network(x, 3, 0), network(x, 3))
    assert torch.equal(network(x, 3, -1), network(x, 3))


# The time


class Doubled(nn.Module):
    features = 3

    def forward(self, t):
        return torch.stack([t, 2 * t, 3 * t], -1).double()


def test_what_embeds_the_time_is_a_module_of_any_number_of_features():
    network = unet((8, 8), (4, 6), time=Doubled())
    seen = []
    network.before[0][0].time.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    network(torch.randn(2, 8, 8, dtype=torch.float64), torch.tensor([1, 4]))
    expected = nn.functional.silu(torch.tensor([[1, 2, 3], [4, 8, 12]], dtype=torch.float64))
    torch.testing.assert_close(seen[0], expected)


def test_the_log_snr_embedding_holds_sines_and_cosines_of_the_log_snr():
    schedule = pyrodiff.BetaSchedule([0.1, 0.3, 0.6])
    embedding = LogSNREmbedding(schedule, 6).double()
    seen = []
    embedding.embedding.layers.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    assert embedding(torch.tensor([[1, 2, 3]])).shape == (1, 3, 6)
    for t, alpha_bar in ((1, 0.9), (2, 0.9 * 0.7), (3, 0.9 * 0.7 * 0.4)):
        angles = [50 * math.log(alpha_bar / (1 - alpha_bar)) * 10000 ** (-k / 3) for k in range(3)]
        expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        torch.testing.assert_close(seen[0][0, t - 1], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_log_snr_embedding_sees_its_schedule_as_it_is():
    """The very object, live: where its table changes, so does what the network is told; and it can be learned."""
    schedule = pyrodiff.LogSNRSchedule(4, first=3.0, last=-3.0)
    embedding = LogSNREmbedding(schedule, 8).double()
    assert embedding.schedule is schedule
    before = embedding(torch.tensor([1, 2]))
    with torch.no_grad():
        schedule._table[3, 1] -= 2.0  # to that of t = 2
    torch.testing.assert_close(embedding(torch.tensor([1])), before[1:])


class Learned(pyrodiff.Schedule):
    """The log SNR is first - t, with a learned start."""

    def __init__(self):
        super().__init__(3)
        self.first = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def beta(self, t): ...
    def signal(self, t): ...
    def noise(self, t): ...

    def log_snr(self, t):
        return self.first - torch.as_tensor(t)


def test_the_gradient_passes_through_the_log_snr_embedding():
    embedding = LogSNREmbedding(Learned(), 8).double()
    t = torch.tensor([1, 3])
    embedding(t).sum().backward()
    gradient, step = embedding.schedule.first.grad.clone(), 1e-5
    with torch.no_grad():
        embedding.schedule.first += step
        above = embedding(t).sum()
        embedding.schedule.first -= 2 * step
        slope = (above - embedding(t).sum()) / (2 * step)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-6)


def test_a_shorter_chain_keeps_the_log_snr_of_its_times():
    forward = pyrodiff.GaussianForward(pyrodiff.LogSNRSchedule(10))
    network = unet((4, 4), (2, 4), time=LogSNREmbedding(forward.schedule, 8))
    reverse = pyrodiff.GaussianReverse(forward, pyrodiff.VelocityPrediction(network, forward))
    diffusion = pyrodiff.Diffusion(forward, reverse, (4, 4))
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    seen = []
    network.embedding[0].embedding.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    diffusion.subchain([2, 5, 9]).reverse(x, torch.tensor([3, 1]))
    torch.testing.assert_close(seen[0], 50 * diffusion.forward_process.schedule.log_snr(torch.tensor([9, 2])))


# The offset


def test_an_offset_is_added_and_learned():
    network, offset = unet((4, 4), (2,), outputs=3, classes=2, vector=5), torch.randn(4, 3, dtype=torch.float64)
    module = Offset(network, offset)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    context = torch.tensor([1, -1, 0, 0, 1]), torch.randn(5, 5, dtype=torch.float64)
    torch.testing.assert_close(module(x, 3, *context), network(x, 3, *context) + offset)
    with torch.no_grad():
        module.offset.add_(1)
    torch.testing.assert_close(module(x, 3, *context), network(x, 3, *context) + offset + 1)  # its own copy
    module(x, 3, *context).sum().backward()
    torch.testing.assert_close(module.offset.grad, torch.full((4, 3), 40.0, dtype=torch.float64))


def test_an_offset_serves_networks_without_context():
    network, x, offset = MLP((2,), hidden=8), torch.randn(3, 2), torch.tensor([1.0, -2.0])
    torch.testing.assert_close(Offset(network, offset)(x, 3), network(x, 3) + offset)
