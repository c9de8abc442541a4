"""The report of a run: one page of HTML with everything in it, to be opened anywhere.

It has the options and the machine, the bound with standard errors, curves and samples, and the commands to reproduce
it.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import plots
from ..base.files import write
from ..likelihood.bounds import Bound
from ..likelihood.yardsticks import Yardsticks
from .info import versions
from .options import BUILT_IN
from .runs import Metrics, Run, curves, picture

__all__ = ["report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; overflow-wrap: anywhere }
h1, h2 { font-weight: 600; line-height: 1.2 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
pre, code { font: 14px/1.45 ui-monospace, monospace } pre { background: #f6f6f4; padding: .8rem 1rem; overflow: auto }
table { border-collapse: collapse } td { padding: .15rem 1.2rem .15rem 0; vertical-align: top }
figure { margin: 1rem 0 } figure img { max-width: 100% } figcaption { color: #666; font-size: 14px }
.number { font-size: 1.5rem } .run td:first-child { white-space: nowrap }
@media (max-width: 40rem) { body { margin: 1rem auto } pre { font-size: 10px; padding: .6rem .4rem } }
"""


def report(run: Run, found: Bound, beside: Yardsticks, samples: Tensor, x_0: Tensor, commands: Sequence[str]) -> Path:
    """Write ``report.html`` into the folder of a run.

    Arguments:
        run: The run.
        found: The bound on the test data.
        beside: The costs of simple distributions on the same data.
        samples: Samples, encoded.
        x_0: As many test data, likewise.
        commands: The commands that made the run.

    Returns:
        The file.
    """
    records, plan, form = Metrics.read(run.folder), run.plan, run.form
    name = plan.reading.data if plan.reading.data in BUILT_IN else Path(plan.reading.data).stem
    trained = f"{run.state['seconds'] / 60:.1f} minutes of training, {run.svi.num_steps} steps"
    number = sum(parameter.numel() for parameter in run.diffusion.parameters())
    parts = [
        f"<h1>{_text(name)}</h1>",
        f"<p class=number>{_text(found.summary)}</p>",
        f"<p>The bound on &minus;log p(x<sub>0</sub>) of {len(found.nats)} test data; {_text(found.convention)}. The "
        f"weights are those of step {run.state['best_step']}, the best on held-out data"
        f"{', averaged' * (plan.training.average > 0)}; {number:,} parameters; {trained}.</p>",
        f"<pre>{_text(found)}</pre>",
        "<p>For comparison, simple distributions fitted to the training data:</p>",
        _table({"this model, at most": found.summary, **{law: one.summary for law, one in beside.items()}}),
        *_samples(run, samples, x_0),
        "<h2>Training</h2>",
        _picture(curves(form, records), "the loss, and the bound on held-out data")
        if any(one.get("loss", one.get("bound")) is not None for one in records)
        else "",
        "<h2>Where the bound is spent</h2>",
        _picture(plots.terms(found).figure, "the terms over t") if plan.model.T > 1 else "",
        f"<p>{_text(form.contents)}</p>",
        "<h2>Commands</h2>",
        f"<pre>{_text(chr(10).join(commands))}</pre>",
        "<h2>Options</h2>",
        _table(plan.values()),
        "<h2>Versions</h2>",
        _table(versions(run.device)),
    ]
    title = f"<title>{_text(name)}: {_text(found.summary)}</title>"
    phone = '<meta name=viewport content="width=device-width, initial-scale=1">'
    head = f"<!doctype html><html lang=en><meta charset=utf-8>{phone}{title}<style>{_STYLE}</style>"
    path = run.folder / "report.html"
    write(path, "\n".join([head, *parts, "</html>\n"]).encode())
    return path


def _samples(run: Run, samples: Tensor, x_0: Tensor) -> list[str]:
    """The figure of samples beside as many data."""
    if not run.form.is_drawable:
        return []
    caption = f"samples, T = {run.plan.model.T}, seed {run.plan.training.seed}, and test data"
    return ["<h2>Samples</h2>", _picture(picture(run.form, samples, x_0), caption)]


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><td>{_text(name)}</td><td><code>{_text(_spelled(value))}</code></td></tr>"
        for name, value in values.items()
    )
    return f"<table class=run>{''.join(rows)}</table>"


def _spelled(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _picture(figure: Any, caption: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{_text(caption)}"><figcaption>{_text(caption)}</figcaption></figure>'
