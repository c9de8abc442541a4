"""README's picture: a Swiss roll and handwritten digits, as two trained chains draw them out of noise.

    python examples/picture.py

Three minutes on two cores, for two of the models of ``demo.py``. Expect their bounds on new data, 1.25 ± 0.04 nats for
2,000 points and 16.36 ± 0.21 nats for the 447 pictures of the test split.
"""

from pathlib import Path

import binary_digits
import swiss_roll
from matplotlib.figure import Figure
from torch import Tensor
from training import options

import pyrodiff
from pyrodiff import datasets, plots

INK = "#1f4e79"
TIMES = {"roll": (40, 24, 16, 8, 0), "digits": (300, 225, 150, 75, 0)}


def draw(roll: Tensor, digits: Tensor, path: Path) -> None:
    """Both rows from noise, on the left, to data: points, shape (5, B, 2), and pictures, shape (5, 16, 8, 8)."""
    figure = Figure(figsize=(9, 3.9), layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 5)
    for axes, t, x in zip(above, TIMES["roll"], roll, strict=True):
        axes.scatter(*x.T, s=1.2, color=INK, linewidths=0, alpha=0.7)
        axes.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal", title=f"t = {t}")
    for axes, t, x in zip(below, TIMES["digits"], digits, strict=True):
        plots.bits(x, axes, columns=4).set_title(f"t = {t}")
    figure.savefig(path, dpi=110)


def main(out: Path, num_steps: int = 3000) -> dict[str, pyrodiff.Bound]:
    """Train both, print their bounds, draw; returns the bounds."""
    models = {"roll": swiss_roll.fit(num_steps), "digits": binary_digits.fit(num_steps)}
    data = {"roll": datasets.swiss_roll(2000, seed=2), "digits": datasets.digits("test", binary=True)}
    bounds, states = {}, []
    for (name, diffusion), number in zip(models.items(), (2000, 16), strict=True):
        bound = bounds[name] = pyrodiff.bound(diffusion, data[name], generator=0)
        print(f"{name:8}{float(bound.mean):6.2f} ± {float(bound.standard_error(bound.nats)):.2f} nats")
        states.append(pyrodiff.AncestralSampler(diffusion).trajectory(number, times=TIMES[name], generator=0))
    draw(*states, out / "picture.png")
    print(f"  picture: {out / 'picture.png'}")
    return bounds


if __name__ == "__main__":
    arguments = options(__doc__, 3000).parse_args()
    main(arguments.out, arguments.steps)
