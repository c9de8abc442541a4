"""How the tutorials become pages: their pictures, a fresh start for each, and no more around them than they need.

sphinx-gallery runs ``docs/tutorials/*.py`` when the docs are built; ``conf.py`` names the functions here.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sphinx.application import Sphinx

TUTORIALS = "generated/tutorials"


class ByNumber:
    """The order of the tutorials: that of the numbers which their names begin with."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __call__(self, name: str) -> int:
        return int(name.split("_")[0])


def pictures(block: object, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Show each figure that a block of a tutorial names for the first time, or ends with.

    The figures of ``pyrodiff.plots`` are plain ones, of which pyplot knows nothing.
    """
    values = block_vars["example_globals"]
    shown, text = values.setdefault("_shown_", []), ""
    for value in list(values.values()):
        figure = value.get_figure() if isinstance(value, Axes) else value
        if not isinstance(figure, Figure) or any(figure is other for other in shown):
            continue
        shown.append(figure)
        path = next(block_vars["image_path_iterator"])
        figure.savefig(path, dpi=2 * 78, facecolor="white")  # twice as large as it is shown
        place = Path(path).relative_to(gallery_conf["src_dir"]).as_posix()
        width = round(78 * figure.get_size_inches()[0])
        text += (
            f"\n.. image:: /{place}\n    :class: tutorial-picture\n    :width: {width}px\n    :alt: {_title(figure)}\n"
        )
    return text


def _title(figure: Figure) -> str:
    titles = [axes.get_title() or axes.get_ylabel() for axes in figure.axes]
    return "; ".join(title.replace("\\", "") for title in titles if title) or "the picture that the code above draws"


def start_afresh(gallery_conf: dict[str, Any], name: str) -> None:
    """Begin every tutorial with the same seed, an empty parameter store, float32 and Pyro's validation.

    Warnings are shown as a reader needs them, without the path of the file that they come from.
    """
    warnings.formatwarning = lambda message, category, *place, **line: f"{category.__name__}: {message}\n"
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
    torch.set_default_dtype(torch.float32)


def plain_page(app: Sphinx, name: str, source: list[str]) -> None:
    """Leave of the frame of a page of sphinx-gallery's one link: to the program that the page is."""
    if not name.startswith(TUTORIALS) or name.endswith("index"):
        return
    page = re.sub(r"\.\. only:: html\n\n    \.\. note::.*?(?=\n\.\. rst-class::)", "", source[0], flags=re.S)
    page, _, _ = page.partition("\n.. _sphx_glr_download_")
    program = f"{Path(name).name}.py"
    source[0] = f"{page}\n\n.. rst-class:: tutorial-program\n\nThis page is a program: :download:`{program}`.\n"


def is_older(folder: Path, package: Path) -> bool:
    """Whether the package was changed since the pages in the folder were made, so that all have to run again."""
    stamp = folder / ".made"
    return not stamp.exists() or stamp.stat().st_mtime < max(path.stat().st_mtime for path in package.rglob("*.py"))


def stamp(app: Sphinx, exception: Exception | None) -> None:
    """Note when the pages were made, for :func:`is_older`."""
    if exception is None:
        Path(app.srcdir, TUTORIALS, ".made").touch()
