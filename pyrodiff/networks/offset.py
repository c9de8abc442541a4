"""A network plus a learned offset of each of its outputs."""

from torch import Tensor, nn

from ..base import arguments, checks
from ..base.arguments import ArgumentError

__all__ = ["Offset"]


class Offset(nn.Module):
    r"""A network plus a learned offset of each of its outputs, :math:`f(x_t, t) + c`, where c starts at a given value.

    A network that starts at 0, as :class:`UNet` does, then starts at the best constant prediction: for
    :class:`LevelPrediction`, the frequency of each level at each pixel.

    Arguments:
        network: A module called as ``network(x_t, t, *context)``.
        offset: The value to start from, a tensor of floats that broadcasts to the network's output.

    Raises:
        ValueError: If ``network`` is not a module, or ``offset`` is not a tensor of finite floats. On a call, if it
            does not broadcast to the output.

    Example:
        >>> k = pyrodiff.datasets.digits("train").long()
        >>> often = (torch.nn.functional.one_hot(k, 17).float().sum(0) + 0.1) / (len(k) + 1.7)
        >>> network = pyrodiff.networks.UNet(event_shape=(8, 8), outputs=17)
        >>> network = pyrodiff.networks.Offset(network, often.log())
        >>> torch.equal(network(torch.zeros(1, 8, 8), t=3)[0], often.log())
        True
    """

    def __init__(self, network: nn.Module, offset: Tensor) -> None:
        super().__init__()
        checks.instance("network", network, nn.Module)
        checks.instance("offset", offset, Tensor)
        if not offset.is_floating_point() or not checks.holds(offset.isfinite()):
            raise ArgumentError("offset", f"must be finite floats, but it is {arguments.described(offset)}")
        self.network, self.offset = network, nn.Parameter(offset.detach().clone())

    def forward(self, x_t: Tensor, t: int | Tensor, *context: int | Tensor | None) -> Tensor:
        """The output, with the shape of the network's."""
        output = self.network(x_t, t, *context)
        try:
            return output + self.offset.expand(output.shape)
        except RuntimeError:
            raise ArgumentError(
                "offset",
                f"must broadcast to the output, of shape {tuple(output.shape)}, but its shape is "
                f"{tuple(self.offset.shape)}",
            ) from None
