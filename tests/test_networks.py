"""The networks: shapes, the start, and that the time matters."""

import pytest
import torch

from pyrodiff.networks import MLP, TimeEmbedding, UNet


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
    network = UNet(event_shape, channels, hidden=8, **kwargs).double().eval()
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"event_shape": (8,)}, "event_shape must be .H, W. or .C, H, W."),
        ({"event_shape": (6, 8), "channels": (4, 4, 4)}, "divisible by 4 for 2 halvings"),
        ({"channels": ()}, "channels must be a sequence"),
        ({"channels": 8}, "channels must be a sequence"),
        ({"channels": (3,)}, "channels must be an int of at least 1, even"),
        ({"hidden": -1}, "hidden must be an int"),
        ({"num_blocks": 0}, "num_blocks must be an int"),
        ({"dropout": 1.0}, "dropout must be a number in"),
        ({"outputs": 0}, "outputs must be an int"),
    ],
)
def test_what_a_u_net_cannot_be_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        UNet(**{"event_shape": (8, 8), **arguments})
