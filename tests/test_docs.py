"""The pages: whole without a network, complete, with numbers in their tables and code that fits into the column.

Whether the code on them runs, and prints what stands there, is what ``pytest docs README.md`` asks."""

import importlib.util
import re
import types
from pathlib import Path

import pytest

import pyrodiff

ROOT = Path(pyrodiff.__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
REFERENCE = {"api.md", "equations.md"}  # which list names, and do not explain them
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(page):
    """The lines of code and of what it prints."""
    return [
        line
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
    ]


@pytest.fixture
def pages():
    """``docs/pages.py``, where Sphinx is installed."""
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_page_would_load_from_elsewhere_is_found(pages):
    """The build fails by it (``pages.check_built``)."""
    foreign = {
        '<script src="https://cdn.example/a.js"></script>': "https://cdn.example/a.js",
        '<script async src="//cdn.example/a.js"></script>': "//cdn.example/a.js",
        '<link rel="stylesheet" href="http://example/a.css">': "http://example/a.css",
        '<img alt="" src="https://example/a.png"/>': "https://example/a.png",
        "<style>@import 'https://example/a.css';</style>": "https://example/a.css",
        '<p style="background: url(https://example/a.png)">': "https://example/a.png",
        "<style>p { background: url('https://example/b.png') }</style>": "https://example/b.png",
        '<object data="HTTPS://example/a.svg">': "HTTPS://example/a.svg",
    }
    for html, address in foreign.items():
        assert pages.foreign(html) == [address], html
    own = '<a href="https://arxiv.org">paper</a><img src="_static/a.png"><script src="a.js?v=1"></script>'
    assert pages.foreign(own + "<style>p { background: url(a.png) }</style><p>https://arxiv.org</p>") == []


def test_nothing_that_is_built_loads_from_elsewhere(pages, tmp_path):
    """So that the build fails, which ends by this."""
    app = types.SimpleNamespace(builder=types.SimpleNamespace(format="html"), outdir=str(tmp_path))
    assert 'app.connect("build-finished", pages.check_built)' in (DOCS / "conf.py").read_text(encoding="utf-8")
    (tmp_path / "b.html").write_text('<a href="https://arxiv.org">paper</a><img src="a.png">')
    pages.check_built(app, None)
    (tmp_path / "a.html").write_text('<script src="https://cdn.example/a.js"></script>')
    with pytest.raises(pages.ExtensionError, match=r"a\.html loads https://cdn\.example/a\.js"):
        pages.check_built(app, None)
    (tmp_path / "a.html").write_text(f"<pre>{ROOT}/pyrodiff/api.py:1: UserWarning</pre>")
    with pytest.raises(pages.ExtensionError, match=rf"a\.html shows {ROOT}"):
        pages.check_built(app, None)


@every_page
def test_no_page_asks_for_a_picture_or_a_script_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"!\[[^\]]*\]\(\s*(?:https?:)?//|```\{(?:image|figure)\}\s*(?:https?:)?//", text)
    assert not re.findall(r"<(?:img|script|link|iframe)\b[^>]*(?:https?:)?//", text)


def test_the_formulas_are_drawn_by_what_the_pages_carry():
    configuration = (DOCS / "conf.py").read_text(encoding="utf-8")
    path = re.search(r'^mathjax_path = "(.*?)"', configuration, re.MULTILINE)[1]
    assert not re.match(r"(?:https?:)?//", path)
    carried = DOCS / "_static" / path
    assert carried.stat().st_size > 10**6
    assert "Apache License" in (carried.parent / "LICENSE").read_text(encoding="utf-8")
    assert carried.name in (ROOT / "NOTICE").read_text(encoding="utf-8")


@every_page
def test_code_is_no_wider_than_the_column(page):
    """Of 120 characters, for which ``_static/pages.css`` makes room in a window of 1280 pixels."""
    assert not [line for line in code_of(page) if len(line) > 120]


@every_page
def test_printed_tables_have_numbers(page):
    """Of a row no number is left out: those that stand there are compared, to the digits that are written."""
    rows = re.compile(r"^(?:L_|ΣL|bound |per dim|K = |latent|observed|global|\w[\w ]{1,28} {2,}-?\d).*\.\.\.")
    assert not [line for line in code_of(page) if rows.match(line)]


def test_numbers_are_compared_to_the_digits_that_are_written(pytestconfig):
    assert "NUMBER" in pytestconfig.getini("doctest_optionflags")


def test_every_public_name_is_explained_on_a_page():
    pages = [page for page in PAGES if page.name not in REFERENCE] + sorted(DOCS.glob("tutorials/*.py"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert not [name for name in pyrodiff.__all__ if not re.search(rf"\b{name}\b", text)]


def test_the_reference_has_every_module_with_a_public_name_once():
    listed = re.findall(r"automodule:: pyrodiff\.([\w.]+)", (DOCS / "api.md").read_text(encoding="utf-8"))
    assert len(listed) == len(set(listed))
    offered = [getattr(pyrodiff, name) for name in pyrodiff.__all__]
    homes = {value.__name__ if isinstance(value, types.ModuleType) else value.__module__ for value in offered}
    assert {home.removeprefix("pyrodiff.") for home in homes - {"pyrodiff"}} <= set(listed)  # where an error says it is


@every_page
def test_links_of_the_readme_and_paths_on_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    local = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if not re.match(r"\w+:", link)]
    assert not [link for link in local if not (page.parent / link).exists()]
    examples = re.findall(r"(?:examples|benchmarks)/\w+\.py", text)
    assert not [name for name in examples if not (ROOT / name).exists()]


def test_the_front_page_has_its_picture():
    picture = DOCS / "_static" / "picture.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 200_000
    for page, path in ((ROOT / "README.md", "docs/_static/picture.png"), (DOCS / "index.md", "_static/picture.png")):
        assert path in page.read_text(encoding="utf-8")
        assert "python examples/picture.py" in page.read_text(encoding="utf-8")
