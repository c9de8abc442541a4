"""Sphinx configuration: `sphinx-build -W --keep-going -b html docs docs/_build/html`, without a network.

The programs in `docs/tutorials` run meanwhile (a few minutes), and an error in one of them is an error of the build.
"""

import gc
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

import pyrodiff

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import gallery  # noqa: E402 - the files beside this one
import pages  # noqa: E402

project = "pyrodiff"
author = "The pyrodiff authors"
copyright = "The pyrodiff authors"
release = version = pyrodiff.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "tutorials", f"{gallery.TUTORIALS}/*.ipynb", f"{gallery.TUTORIALS}/*.py"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # an override without a docstring says no more than what it overrides
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Arguments", "params_style"), ("Returns", "returns_style"), "References"]

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": gallery.TUTORIALS,
    "filename_pattern": r"/\d+_",
    "ignore_pattern": r"conftest\.py",
    "within_subsection_order": "gallery.ByNumber",
    "abort_on_example_error": True,
    "run_stale_examples": gallery.is_older(HERE / gallery.TUTORIALS, Path(pyrodiff.__file__).parent),
    "image_scrapers": ("gallery.pictures",),
    "reset_modules": ("matplotlib", "gallery.start_afresh"),
    "capture_repr": (),  # what is printed is shown, and pictures
    "min_reported_time": 10**6,  # no times of one machine on a page
    "write_computation_times": False,
    "download_all_examples": False,
    "notebook_extensions": set(),
    "show_signature": False,
    "remove_config_comments": True,
}

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
mathjax_path = "mathjax/tex-svg.js"  # carried in _static: formulas are drawn without a network
mathjax3_config = {
    "options": {"enableMenu": False},  # the menu would load more files, which are not carried
    "svg": {"fontCache": "global"},
}
html_title = f"pyrodiff {release}"
html_copy_source = False


def literal_shapes(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Show shapes such as (B, *event_shape) as code: the docstrings write them plainly, and * would start emphasis."""
    shape = re.compile(r"(?<!`)\((?:\w+, )?\*[\w.]*(?:, \w+)?\)(?!`)")
    lines[:] = [shape.sub(r"``\g<0>``", line) for line in lines]


def skip_private(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Show of a module what its ``__all__`` names, but in the order of the source."""
    home = sys.modules.get(getattr(obj, "__module__", ""))
    return True if what == "module" and name not in getattr(home, "__all__", ()) else None


def public_bases(app: Sphinx, name: str, obj: type, options: object, bases: list[type]) -> None:
    """Show the nearest public class in the place of a private base."""
    for i, base in enumerate(bases):
        while base.__module__.startswith("pyrodiff") and base.__name__ not in sys.modules[base.__module__].__all__:
            base = base.__bases__[0]
        bases[i] = base


def no_empty_arguments(app: Sphinx, what: str, name: str, obj: object, options: object, *signature: str) -> object:
    """Show () for a class without an ``__init__`` of its own, not torch's (*args, **kwargs)."""
    if what == "class" and (signature[0] or "").startswith("(*args"):
        return "()", signature[1]
    return None


def setup(app: Sphinx) -> None:
    gc.freeze()  # what is imported stays
    gc.disable()  # sphinx-gallery looks for garbage after each tutorial, and there is little in the pages
    app.connect("source-read", gallery.plain_page)
    app.connect("source-read", pages.trimmed)
    app.connect("build-finished", pages.check_built)
    app.connect("build-finished", gallery.stamp)
    app.connect("autodoc-process-docstring", literal_shapes)
    app.connect("autodoc-skip-member", skip_private)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-signature", no_empty_arguments)
