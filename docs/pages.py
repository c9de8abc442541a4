"""What the built pages have to be: whole without a network, the same anywhere, and without empty lines in code.

``conf.py`` names the functions here; ``tests/test_docs.py`` tries them.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError


class _Loaded(HTMLParser):
    """Gathers the addresses that a page loads by itself; a link that a reader may follow is none."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag != "a":
            names = ("href",) if tag == "link" else ("src", "srcset", "data", "poster", "xlink:href")
            self.addresses += [values[name] for name in names if values.get(name)]
        self._styled(values.get("style") or "")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self._styled(data)

    def _styled(self, css: str) -> None:
        self.addresses += re.findall(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""", css)


def foreign(html: str) -> list[str]:
    """The addresses on other machines that a page or a style sheet, as a page's ``<style>``, loads by itself."""
    page = _Loaded()
    page.feed(html)
    return [address for address in page.addresses if re.match(r"(?:[a-z]+:)?//", address.strip(), re.IGNORECASE)]


def check_built(app: Sphinx, exception: Exception | None) -> None:
    """Fail if a built page or style sheet would load anything from another machine, or shows a path of this one."""
    if exception is not None or app.builder.format != "html":
        return
    own, found = {sys.prefix, str(Path(__file__).parents[1])} - {"/", "/usr"}, []
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            text = path.read_text(encoding="utf-8")
            page = f"<style>{text}</style>" if path.suffix == ".css" else text
            found += [f"{path.relative_to(app.outdir)} loads {address}" for address in foreign(page)]
            found += [f"{path.relative_to(app.outdir)} shows {place}" for place in own if place in text]
    if found:
        raise ExtensionError("pages must be whole without a network and the same anywhere, but " + "; ".join(found))


def trimmed(app: Sphinx, name: str, source: list[str]) -> None:
    """Drop the empty line that ends a block of doctests, which they need and a reader does not."""
    source[0] = re.sub(r"\n\n```$", "\n```", source[0], flags=re.MULTILINE)
