"""Files that show the tensors of the best trial: their extreme entries by name, their distribution, images."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._terminal import plain
from .._typing import Params
from .pictures import histograms_svg, is_image_shaped, png_of

_MOST_TENSORS = 4
"""Of which there is a histogram and an image, the largest first."""
_MOST_LISTED = 20
"""Tensors whose extreme entries are listed."""
_EXTREME = 25
"""Least and largest entries of each tensor that are listed."""
EXTREMES, HISTOGRAMS = "extreme hyperparameters.csv", "histograms.svg"


@dataclass(frozen=True)
class File:
    """An artifact of a trial."""

    name: str
    mimetype: str
    content: bytes


def files_of(tensors: Params, logarithmic: Mapping[str, bool]) -> list[File]:
    """What shows the tensors of one trial.

    Args:
        tensors: external, by flat name.
        logarithmic: Whether they are tuned on that scale, as far as that is known.
    """
    sized = sorted((n for n, v in tensors.items() if v.numel()), key=lambda n: -tensors[n].numel())
    if not sized:
        return []
    drawn = [n for n in sized if bool(torch.isfinite(tensors[n]).all())][:_MOST_TENSORS]
    files = [File(EXTREMES, "text/csv", _extremes({n: tensors[n] for n in sized[:_MOST_LISTED]}))]
    if drawn:
        scales = [(n, tensors[n], _is_log(n, tensors[n], logarithmic)) for n in drawn]
        files.append(File(HISTOGRAMS, "image/svg+xml", histograms_svg(scales)))
    for name in drawn:
        if is_image_shaped(tensors[name].shape):
            log = _is_log(name, tensors[name], logarithmic)
            files.append(
                File(f"{_file_name(name)}.png", "image/png", png_of(tensors[name], log=log))
            )
    return files


def _extremes(tensors: Params) -> bytes:
    """Lines ``hyperparameter, index, value, rank``; rank 1 is the largest entry of its tensor."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["hyperparameter", "index", "value", "rank"])
    for name, value in tensors.items():
        flat = value.detach().reshape(-1).to("cpu")
        shown = _as_text(name)
        for rank, position in _ranked(flat):
            index = np.unravel_index(position, tuple(value.shape)) if value.ndim else ()
            where = " ".join(str(int(i)) for i in index)
            rows.writerow([shown, where, repr(float(flat[position])), rank])
    return text.getvalue().encode()


def _ranked(flat: Tensor) -> list[tuple[int, int]]:
    """(rank from the largest on, position) of all entries, or of the extreme ones."""
    count = flat.numel()
    if count <= 2 * _EXTREME:
        return [(i + 1, int(p)) for i, p in enumerate(flat.argsort(descending=True))]
    top, bottom = flat.topk(_EXTREME).indices, flat.topk(_EXTREME, largest=False).indices.flip(0)
    ranked = [(i + 1, int(p)) for i, p in enumerate(top)]
    return ranked + [(count - _EXTREME + 1 + i, int(p)) for i, p in enumerate(bottom)]


def _is_log(name: str, value: Tensor, logarithmic: Mapping[str, bool]) -> bool:
    if name in logarithmic:
        return logarithmic[name]
    low, high = (float(v) for v in torch.aminmax(value))
    return low > 0.0 and high > 1000.0 * low


def _as_text(name: str) -> str:
    """A name in which a spreadsheet sees no formula."""
    shown = plain(name)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def _file_name(name: str) -> str:
    """Of letters, digits and the like: it ends up in the name of a file that is downloaded."""
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in plain(name))[:60]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:6]
    return kept if kept == name else f"{kept}_{digest}"
