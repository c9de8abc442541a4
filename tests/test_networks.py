"""The networks: shapes, the start, and that the time matters."""

import pytest
import torch

from pyrodiff.networks import MLP, TimeEmbedding


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
