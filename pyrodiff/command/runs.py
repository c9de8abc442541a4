"""A run and its folder: the model and its SVI, saved at any step and opened again.

``settings.toml``
    the plan; ``pyrodiff train --config`` reads it.
``checkpoints/``
    ``step-00001000.pt``, the last few, and ``best.pt``, by the bound on held-out data.
``metrics.jsonl``
    lines of JSON: the loss every few steps, the held-out bound term by term at evaluations.
``pictures/``
    samples and the terms over t, at each evaluation.
``bound.npz``, ``samples.npz``, ``report.html``
    what came out.
"""

import io
import json
import math
import os
import re
import sys
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .. import checkpoints, plots
from ..base import arguments, ranks
from ..base.arguments import ArgumentError
from ..base.files import plainly, printable, write
from ..likelihood.bounds import Bound
from ..pair.diffusion import Diffusion
from ..pair.elbo import DiffusionELBO
from ..sampling.sampler import Sampler
from ..training.svi import SVI, exponential_average
from . import models, options
from .data import Form
from .options import Model, Plan

__all__ = [
    "Kept",
    "Metrics",
    "Run",
    "bound_in",
    "device_of",
    "finite",
    "kept",
    "last_checkpoint",
    "curves",
    "numbered",
    "picture",
    "resumed_from",
    "save_arrays",
    "save_figure",
    "say",
    "show",
]


def say(line: str) -> None:
    """Print a line on stderr, above the progress bar if there is one; on rank 0 only.

    Arguments:
        line: The line.
    """
    if ranks.number() == 0:
        tqdm.write(f"pyrodiff: {printable(line)}", file=sys.stderr)
        sys.stderr.flush()


def show(text: object) -> None:
    """Print a result of a command on stdout.

    Arguments:
        text: The result.
    """
    print(printable(text, "\n"), flush=True)


def device_of(name: str) -> torch.device:
    """The device that is asked for.

    Arguments:
        name: "auto", "cpu", "cuda", "cuda:1", ...

    Raises:
        ArgumentError: If it is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ArgumentError("device", f"must be auto, cpu, cuda or cuda:1, say, but it is {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ArgumentError(
                "device", f"must be one that is there, but torch sees no GPU for {name!r}: try --device cpu"
            )
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ArgumentError("device", f"must be one of {torch.cuda.device_count()} GPUs, but it is {name!r}")
    elif device.type != "cpu":
        raise ArgumentError("device", f"must be cpu or cuda, but it is {name!r}")
    return device


class Run:
    """A run and its folder.

    Arguments:
        folder: The folder.
        plan: The plan.
        form: The form of the data.
        device: The device to compute on.
        often: The frequency of each level in each dimension, which ``LevelPrediction`` starts from.

    Attributes:
        diffusion: The model.
        svi: Its SVI. state: What else a checkpoint keeps: the last step logged and evaluated, the best bound, the time
            taken.
    """

    def __init__(self, folder: Path, plan: Plan, form: Form, device: torch.device, often: Tensor | None = None) -> None:
        self.folder, self.plan, self.form, self.device = folder, plan, form, device
        pyro.set_rng_seed(plan.training.seed)
        self.diffusion: Diffusion = models.build(plan, form, often).to(device)
        self.svi = self._svi()
        self.state: dict[str, Any] = {
            **{"logged": 0, "evaluated": 0, "saved": 0, "best": math.inf, "best_step": 0, "seconds": 0.0},
            **{"loss": torch.zeros((), device=device), "drawn": 0},
        }

    def _svi(self) -> SVI:
        training = self.plan.training
        programs = models.pair(self.plan, self.diffusion).to(self.device)
        options = {"lr": training.lr, "weight_decay": training.weight_decay} | _ways(training.lr, self.device)
        return SVI(
            programs.model,
            programs.guide,
            partial(torch.optim.AdamW, **options),
            DiffusionELBO(),
            training.clip_norm * training.batch_size * training.accumulate * ranks.count(),
            scheduler=partial(LambdaLR, lr_lambda=partial(_rate, steps=training.train_steps, warmup=training.warmup)),
            accumulate=training.accumulate,
            autocast={"bfloat16": torch.bfloat16, "float16": torch.float16}.get(training.autocast),
            average=exponential_average(training.average) if training.average > 0 else None,
            compile=training.compile,
        )

    @classmethod
    def opened(cls, folder: str | os.PathLike[str], which: str = "best", device: str = "auto") -> "Run":
        """A trained run, with the weights of a checkpoint: the averaged ones, if there is an average.

        Arguments:
            folder: The folder.
            which: "best", "last", or the path of a checkpoint.
            device: The device to put it on.

        Raises:
            ValueError: If there is no such run.
        """
        folder = Path(folder)
        path, plan, form, content = kept(_checkpoint(folder, which))
        record = folder / "settings.toml"
        if record.is_file():
            recorded = Plan.of(options.read(record, str(record)))
            _refuse_other_options(recorded, plan, path)
            plan = plan.but(data=recorded.reading.data)  # the data may have moved
        try:
            run = cls(folder, plan, form, device_of(device))
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise _no_run(path) from error
        run._restore(path, content)
        if run.svi.average is not None:
            run.svi.adopt_average()
        run.diffusion.eval()
        return run

    def restore(self, checkpoint: "Kept") -> None:
        """Resume from a checkpoint of this run.

        Arguments:
            checkpoint: The checkpoint, as :func:`kept` read it.

        Raises:
            ValueError: If it is of a run with other options, except for those that may change.
        """
        self.refuse_other_data(checkpoint.form, checkpoint.path)
        _refuse_other_options(self.plan, checkpoint.plan, checkpoint.path)
        self._restore(checkpoint.path, checkpoint.content)

    def _restore(self, path: Path, content: dict[str, Any]) -> None:
        self.svi = self._svi()  # one that another checkpoint was put into has an optimizer already
        try:
            state = checkpoints.restore(path, self.svi, content)["state"]
            optimizer, scheduler = self.svi.optimizer, self.svi.scheduler
            if optimizer is None or not isinstance(scheduler, LambdaLR):
                raise _no_run(path)
            settings = optimizer.param_groups[0]
            if not all(_is_as_made(settings.get(name), optimizer.defaults[name]) for name in _SETTINGS):
                raise _no_run(path)
            # the saved scheduler has the rate of the earlier train_steps
            rate = self.plan.training.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)
            if isinstance(settings["lr"], Tensor):
                settings["lr"].fill_(rate)
            else:
                settings["lr"] = rate
            scheduler._last_lr = [rate]
            for parameter, moments in optimizer.state.items():
                if any(one.shape != (() if name == "step" else parameter.shape) for name, one in moments.items()):
                    raise _no_run(path)
        except ValueError as error:
            raise _beside(error, path) from error
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise _beside(_no_run(path), path) from error
        ours = {name: state[name] for name in self.state.keys() & state.keys()}
        self.state = {**self.state, **ours, "loss": state["loss"].to(self.device)}

    def refuse_other_data(self, form: Form, where: object) -> None:
        """Refuse other data than the run's: their test data may have been trained on, or have other units.

        Arguments:
            form: What the other data are.
            where: Where they are known from.

        Raises:
            ValueError: If they are others.
        """
        if form.fingerprint != self.form.fingerprint:
            ours = self.plan.reading.data
            raise ArgumentError("data", f"must be those that the run began with, but {ours} and {where} differ")

    def save(self, path: Path) -> None:
        """Save a checkpoint.

        Arguments:
            path: The file.
        """
        settings = {name: list(one) if isinstance(one, tuple) else one for name, one in self.plan.values().items()}
        checkpoints.save(path, self.svi, settings=settings, form=self.form.plain(), state=self.state)

    def context(self, number: int, first: int = 0, label: int | None = None) -> tuple[Tensor, ...]:
        """The labels of samples: all labels in turn, or only one; nothing for a run without labels.

        Arguments:
            number: The number of samples.
            first: The number of the first.
            label: The one label.
        """
        if self.form.classes is None:
            return ()
        labels = torch.arange(first, first + number, device=self.device) % self.form.classes
        return (labels if label is None else torch.full_like(labels, label),)

    def sampler(self, name: str) -> Sampler:
        """A sampler of the model.

        Arguments:
            name: Which, of :data:`~pyrodiff.command.models.SAMPLERS`.

        Raises:
            ValueError: If it does not suit the model.
        """
        try:
            return models.SAMPLERS[name](self.diffusion)
        except ValueError as error:
            raise ArgumentError(f"--sampler {name}", f"does not suit this run: {error}") from None


def _rate(step: int, steps: int, warmup: int) -> float:
    """The learning rate as a fraction of its maximum: a linear warm-up, then a cosine decay."""
    return min(1.0, (step + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def _ways(rate: float, device: torch.device) -> dict[str, Any]:
    """The options by which an optimizer computes on a device: on a GPU, so that a compiled step is one CUDA graph."""
    if device.type != "cuda":
        return {}
    return {"lr": torch.tensor(rate, device=device), "fused": True, "capturable": True}


_SETTINGS = ("betas", "eps", "weight_decay", "amsgrad", "maximize", "capturable", "differentiable")  # of AdamW


def _is_as_made(value: object, made: object) -> bool:
    """Whether a setting of the optimizer is the one that it was made with, which a plan says."""
    is_plain = not isinstance(value, tuple) or all(type(one) is float for one in value)
    return type(value) is type(made) and is_plain and value == made


class Kept(NamedTuple):
    """A checkpoint that was read: where it is, the plan and the data's form in it, and all that it holds."""

    path: Path
    plan: Plan
    form: Form
    content: dict[str, Any]


def last_checkpoint(folder: Path, whole: bool = False, but: Collection[Path] = ()) -> Path | None:
    """The last checkpoint of a run, by its step; the best one if there is no other, and None if there is none.

    Arguments:
        folder: The folder of the run.
        whole: Whether those that are damaged do not count.
        but: Others that do not count.
    """
    paths = [folder / "checkpoints" / "best.pt", *(path for _, path in numbered(folder))]
    found = (path for path in reversed(paths) if path.is_file() and path not in but)
    return next((path for path in found if not whole or _is_whole(path)), None)


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints with their steps, in order; files with other names are ignored.

    Arguments:
        folder: The folder of the run.
    """
    found = [(_NUMBERED.fullmatch(path.name), path) for path in (folder / "checkpoints").glob("step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match and path.is_file())


_NUMBERED = re.compile(r"step-([0-9]{1,18})\.pt")


def _checkpoint(folder: Path, which: str) -> Path:
    if which not in ("best", "last"):
        return Path(which)
    best = folder / "checkpoints" / "best.pt"
    found = best if which == "best" and best.is_file() else last_checkpoint(folder)
    if found is None:
        raise ArgumentError("RUN", f"must be the folder of a run with a checkpoint, but {folder} has none")
    return found


def _refuse_other_options(ours: Plan, theirs: Plan, path: Path) -> None:
    """Refuse the checkpoint of a run with other options; the path of the data may differ."""
    here, there = ours.values(), theirs.values()
    for name in options.names():
        if here.get(name) != there.get(name) and not options.may_change(name):
            raise ArgumentError(name, f"must be {there.get(name)!r} as in {path}, but it is {here.get(name)!r}")


_STATE = dict.fromkeys(("logged", "evaluated", "saved", "best_step", "drawn"), int) | {"best": float, "seconds": float}


def resumed_from(folder: Path, plan: Plan, form: Form, whole: bool) -> tuple[Kept | None, Kept | None]:
    """The checkpoint to resume a run from, and its best one, both checked before anything is built.

    Arguments:
        folder: The folder of the run.
        plan: The plan to resume it with.
        form: The form of the data.
        whole: Whether to ignore damaged ones, unless there are no others.

    Raises:
        ValueError: If one of them is damaged, or of another run.
    """
    last, best = last_checkpoint(folder, whole) or last_checkpoint(folder), folder / "checkpoints" / "best.pt"
    has_best = best.is_file() and (not whole or _is_whole(best))
    read = {path: kept(path) for path in {last, best if has_best else None} if path is not None}
    for path, found in read.items():
        _refuse_other_options(plan, found.plan, path)
        if any(vars(form)[name] != vars(found.form)[name] for name in ("read_as", "event_shape", "levels", "classes")):
            raise ArgumentError("data", f"must be those that the run began with, but {path} is of others")
    return read.get(last) if last else None, read.get(best)


def kept(path: Path) -> Kept:
    """What a checkpoint holds.

    Arguments:
        path: The file.

    Raises:
        ValueError: If it is damaged, or of something else; the error names another one that is whole.
    """
    try:
        return _content(path)
    except ValueError as error:
        raise _beside(error, path) from error


def _beside(error: ValueError, path: Path) -> ValueError:
    """What is wrong with a checkpoint, and which other one is whole."""
    whole = last_checkpoint(path.parent.parent, whole=True, but=[path])
    beside = f"{whole} is whole: train --resume=whole resumes from it, --checkpoint takes it"
    return arguments.amended(error, f"; {beside}") if whole else error


def _is_whole(path: Path) -> bool:
    try:
        return bool(_content(path))
    except ValueError:
        return False


def _content(path: Path) -> Kept:
    state, number = checkpoints.load(path), _NUMBERED.fullmatch(path.name)
    try:
        more, step = state["more"], state["svi"]["counts"]["num_steps"]
        kinds = [(more["state"].get(name, 0), one) for name, one in {**_STATE, "loss": Tensor}.items()]
        are_plain = isinstance(more["settings"], dict) and all(map(_is_plain, more["settings"].values()))
        loss = more["state"].get("loss", torch.zeros(()))
        if not all(isinstance(*one) for one in kinds) or not are_plain or loss.dim() or not loss.is_floating_point():
            raise _no_run(path)
        plan, form, most = Plan.of(more["settings"]), Form.of(more["form"]), 2 * path.stat().st_size
        if not _is_form(form) or _held(state, most) > most:
            raise _no_run(path)
        _refuse_sizes(plan.model, form, path)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise _no_run(path) from None
    if number is not None and int(number[1]) != step:
        raise ArgumentError("checkpoint", f"must have the name of its step, but {path} is of step {step}")
    return Kept(path, plan, form, state)


def _is_form(form: Form) -> bool:
    """Whether a form is valid: fields of the right types, and all that its kind needs."""
    has = {name for name in ("levels", "shift", "scale", "rate") if vars(form)[name] is not None}
    numbers, units = (form.levels, form.classes, *form.event_shape), (form.shift, form.scale)
    return (
        has == {"numbers": {"shift", "scale"}, "levels": {"levels"}, "bits": {"rate"}}[form.read_as]
        and all(type(one) is str for one in (form.dtype, form.fingerprint, form.contents))
        and all(one is None or (type(one) is int and one > 0) for one in numbers)
        and (form.levels is None or form.levels > 1)
        and (form.rate is None or (type(form.rate) is float and 0 < form.rate < 1))
        and all(one is None or (one.dtype == torch.float64 and bool(one.isfinite().all())) for one in units)
        and (form.scale is None or bool((form.scale > 0).all()))
    )


def _held(state: object, most: int) -> int:
    """How many bytes something holds, one at least for each of its parts; counted no further than to a limit.

    A small file can hold what is without end, lists of the same lists and tensors of one number, for whoever goes
    through it.
    """
    held, parts = 0, [state]
    while parts and held <= most:
        part = parts.pop()
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
        held += part.numel() * part.element_size() if isinstance(part, Tensor) else 1
    return held


def _is_plain(value: object) -> bool:
    """Whether this may be the value of an option; anything else is not printed, as it may be large."""
    return isinstance(value, int | float | str) or (isinstance(value, list) and {type(one) for one in value} <= {int})


def _no_run(path: Path) -> ArgumentError:
    return ArgumentError(
        "RUN", f"must be the folder of a run that pyrodiff train made, but {path} is of something else"
    )


def _refuse_sizes(model: Model, form: Form, path: Path) -> None:
    """Refuse a model too large for the checkpoint file, before it is built: a file of forged options could ask for any.

    ``least`` numbers, of four bytes each, are in the file of any such model; there are more.
    """
    shape, widths = form.event_shape, model.channels or (model.hidden,)
    size, area = math.prod(shape), math.prod(shape[-2:]) >> 2 * len(widths[1:])  # each width but the first halves sides
    inner = model.hidden * widths[-1] * area if model.channels else widths[0] * size  # to the hidden units
    outputs = form.levels if model.prediction == "level" and form.levels is not None else 1
    blocks = model.blocks * sum(250 + width**2 for width in widths)  # each a square matrix, and more than 250 beside
    labels = (form.classes or 0) * (64 if model.channels else widths[0])  # their embedding
    least = model.T + size * outputs + inner + blocks + labels
    units = [one.shape for one in (form.shift, form.scale) if one is not None]
    if min(shape, default=1) < 1 or 4 * least > path.stat().st_size or any(unit != shape for unit in units):
        raise _no_run(path)


class Metrics:
    """The metrics of a run: lines of JSON in a file, and TensorBoard's files if that is installed.

    Arguments:
        folder: The folder of the run.
        step: The step that the run is resumed from; later records are dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl"
        records = {
            (record["step"], "bound" in record): record for record in self.read(folder) if record["step"] <= step
        }
        write(self.path, "".join(f"{json.dumps(record)}\n" for record in records.values()).encode())
        self._board = _board(folder / "tensorboard", step)

    def note(self, step: int, **values: Any) -> None:
        """Record values of a step."""
        with open(self.path, "a", encoding="utf-8", opener=plainly) as file:
            file.write(json.dumps({"step": step, **{name: _sayable(value) for name, value in values.items()}}) + "\n")
        for name, value in values.items() if self._board is not None else ():
            if isinstance(value, float | int):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._board is not None:
            self._board.close()

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """The records in a run's folder, without lines that are cut short or of another kind."""
        records, path = [], folder / "metrics.jsonl"
        with open(path, "rb", opener=plainly) if path.is_file() else nullcontext(io.BytesIO()) as file:
            for line in iter(partial(file.readline, 2**16), b""):
                with suppress(ValueError, RecursionError):
                    record = json.loads(line)
                    is_record = isinstance(record, dict) and type(record.get("step")) is int
                    if is_record and all(map(_is_sayable, record.values())):
                        records.append(record)
        return records


def _is_sayable(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and -1e30 < value < 1e30)


def _sayable(value: Any) -> Any:
    """A value for JSON, which has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # it is not installed
        return None
    return SummaryWriter(folder, purge_step=step + 1)


# arguments that weights have no part in
_NO_WEIGHTS = ("data", "num_samples", "num_steps", "num_times", "num_particles")


@contextmanager
def finite(step: int) -> Iterator[None]:
    """A context that turns a ValueError, as distributions and plots raise for NaN, into a FloatingPointError.

    Arguments:
        step: The step of the weights.

    Raises:
        FloatingPointError: If so.
    """
    try:
        yield
    except ValueError as error:
        if isinstance(error, ArgumentError) and error.argument in _NO_WEIGHTS:
            raise
        raise FloatingPointError(f"what the weights give is not finite at step {step}: {str(error)[:200]}") from error


def picture(form: Form, samples: Tensor, data: Tensor | None = None) -> Figure:
    """A figure of samples, beside data if given; vectors of numbers as histograms.

    Arguments:
        form: The form of the data, which must be drawable.
        samples, data: Both encoded.
    """
    if form.read_as == "numbers" and data is not None and len(form.event_shape) == 1 and form.event_shape != (2,):
        return plots.histograms(form.decoded(samples), form.decoded(data))
    return plots.beside(form.drawable(samples), None if data is None else form.drawable(data))


def curves(form: Form, records: list[dict[str, Any]]) -> Any:
    """A figure of a training's metrics, in the displayed unit.

    Arguments:
        form: The form of the data.
        records: The records of :class:`Metrics`.
    """
    unit = "nats per datum" if form.unit == "nats" else "bits per dimension"
    return plots.curves(records, scale=form.per_unit(1.0), unit=unit).figure


def save_figure(path: Path, figure: Any) -> None:
    """Write a figure as PNG, atomically.

    Arguments:
        path: The file.
        figure: The figure.
    """
    data = io.BytesIO()
    figure.savefig(data, dpi=130, format="png")
    write(path, data.getbuffer())


def save_arrays(path: Path, **arrays: Tensor) -> None:
    """Write tensors as a compressed .npz, atomically.

    Arguments:
        path: The file.
        arrays: The tensors.
    """
    data = io.BytesIO()
    numbers: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in arrays.items()}
    np.savez_compressed(data, **numbers)
    write(path, data.getbuffer())


def bound_in(path: Path) -> Bound:
    """The bound in a run's folder; refused if it claims to unpack to much more than numbers can.

    Arguments:
        path: The file.

    Raises:
        ArgumentError: If so, or if it holds no bound.
    """
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        if sum(info.file_size for info in file.infolist()) > 100 * path.stat().st_size:
            raise ArgumentError("RUN", f"must be the folder of a run, but {path} says to hold more than it does")
    return Bound.load(path)
