"""``pyrodiff sample --given``: samples of the unknown part of a datum, given the known part."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from .. import datasets, readers
from ..base.arguments import ArgumentError
from ..inference.approximations import replacement
from ..inference.observations import Inpainting
from ..inference.posterior import posterior
from ..likelihood.estimate import rounded
from .runs import Run, say, show

__all__ = ["Given", "completed"]


class Given:
    """The known part of a datum.

    Arguments:
        run: The run, whose kind of data it is.
        values: A file of the datum, .npy in the shape and the units of the data, or a picture.
        mask: A file of which of its numbers are known: .npy of bools, zeros and ones, or a picture, white where known.
        noise: The standard deviation of noise on the known numbers, as a fraction of the data's; above 0 for numbers.

    Raises:
        ArgumentError: If a file cannot be read or has another shape, the datum could be none of the run's, all or none
            of it is known, or there is no such noise.
    """

    def __init__(self, run: Run, values: Path, mask: Path | None, noise: float) -> None:
        form = run.form
        if mask is None:
            raise ArgumentError("--mask", "must be given with --given: a file of which of its numbers are known")
        known = _known(mask, form.event_shape)
        if bool(known.all()) or not bool(known.any()):
            raise ArgumentError("--mask", f"must leave some numbers known and some not, but {mask} does not")
        found = _read("--given", values, form.event_shape)
        raw = torch.where(known, found.double(), 0.0)
        if form.read_as == "numbers":
            if not noise > 0:
                raise ArgumentError(
                    "--noise", f"must be above 0 for numbers, whose likelihood is a density, but it is {noise}"
                )
            if not bool((raw.abs() < 1e30).all()):
                raise ArgumentError("--given", f"must be finite and below 1e30 where it is known, but {values} is not")
        else:
            most = (form.outcomes or 2) - 1
            if form.read_as == "bits" and noise > 0:
                raise ArgumentError("--noise", f"must be left out for bits, but it is {noise}")
            if most > 1 and bool((raw <= 1).all()) and (found.is_floating_point() or found.dtype == torch.bool):
                raise ArgumentError(  # a white pixel would be taken for an almost black one
                    "--given", f"must be whole numbers in 0..{most}, but {values} has {found.dtype} in 0..1: scale them"
                )
            if bool(((raw < 0) | (raw > most) | (raw != raw.round())).any()):
                raise ArgumentError(
                    "--given", f"must be whole numbers in 0..{most} where it is known, but {values} is not"
                )
            raw = raw.long()
        x_0 = form.encoded(raw[None])[0].to(run.device)
        self.observation = Inpainting(known.to(run.device), x_0, noise)
        # in the data's units, the log density of the known part is less by this
        self.log_scale = 0.0 if form.scale is None else float(form.scale.log()[known].sum())


def _known(path: Path, shape: torch.Size) -> Tensor:
    """Which numbers are known by a mask; for pictures in colour, it may be one for all channels."""
    try:
        mask = _read("--mask", path, shape)
    except ArgumentError:
        if len(shape) != 3:
            raise
        mask = _read("--mask", path, torch.Size(shape[1:])).expand(shape)
    is_picture = mask.dtype == torch.uint8 and bool((mask > 1).any())
    if not is_picture and not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError("--mask", f"must be of bools, zeros and ones, or a picture, but {path} has other numbers")
    return mask > 127 if is_picture else mask == 1


def _read(argument: str, path: Path, shape: torch.Size) -> Tensor:
    """One datum's numbers in a file."""
    try:
        found = datasets.array(path) if path.suffix in (".npy", ".npz") else readers.picture(path)
    except ArgumentError as error:
        raise ArgumentError(argument, f"must be a file of one datum, but {path}: {error.said}") from error
    found = found[0] if found.dim() == len(shape) + 1 and len(found) == 1 else found
    if found.shape != shape:
        raise ArgumentError(
            argument, f"must have the shape {tuple(shape)} of a datum, but {path} has {tuple(found.shape)}"
        )
    return found


def completed(
    run: Run, given: Given, number: int, particles: int, by_replacement: bool, seed: int, context: tuple[Tensor, ...]
) -> Tensor:
    """Samples of a datum given its known part; evidence and effective sample size are printed.

    Arguments:
        run: The run.
        given: The known part.
        number: The number of samples.
        particles: The number of particles of sequential Monte Carlo.
        by_replacement: Whether to use replacement instead, which is fast and biased.
        seed: The seed of all draws.
        context: The label, where the run has labels, with one row.

    Returns:
        The samples, encoded.
    """
    if by_replacement:
        return replacement(run.diffusion, given.observation, *context, num_samples=number, generator=seed)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = posterior(run.diffusion, given.observation, *context, num_particles=particles, generator=seed)
    for warning in warned:
        say(f"warning: {warning.message}")
    evidence = given.log_scale - float(found.log_evidence)
    show(f"-log p of what is known: {rounded(evidence, float(found.standard_error))} nats")
    show(f"effective sample size: {float(found.effective_sample_size[-1]):.1f} of {particles} particles")
    return found.draw(number, generator=seed)
