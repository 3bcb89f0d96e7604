"""Pictures without a drawing library: tensors as PNG, and histograms as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

from .._png import to_png
from .._terminal import plain

_MOST_IMAGES = 64
_MOST_PIXELS = 512
_LEAST_SIDE, _MOST_SIDE = 6, 512
_BINS = 40
_WIDTH, _HEIGHT, _MARGIN = 640, 200, 46


def is_image_shaped(shape: Sequence[int]) -> bool:
    """Whether a tensor can be seen as one image, or as several: ``(h, w)``, ``(n, h, w)`` or ``(n, c, h, w)`` with
    one or three channels, and sides of 6 to 512 of which neither is more than twice the other."""
    if len(shape) not in (2, 3, 4) or (len(shape) == 4 and shape[1] not in (1, 3)):
        return False
    h, w = shape[-2:]
    return min(h, w) >= _LEAST_SIDE and max(h, w) <= min(_MOST_SIDE, 2 * min(h, w))


def png_of(value: Tensor, log: bool) -> bytes:
    """A tensor for which :func:`is_image_shaped` holds: black is its least entry, white its largest.

    The first 64 of several images, in rows; a pixel is as many pixels as there is room for.

    Args:
        log: Show logarithms.
    """
    shown = value.detach().to("cpu", torch.float64)
    shown = shown.log() if log else shown
    h, w = shown.shape[-2:]
    if shown.ndim == 4:
        images = shown.permute(0, 2, 3, 1)
    elif shown.ndim == 3 and shown.shape[0] == 3:
        images = shown.permute(1, 2, 0)[None]
    else:
        images = shown.reshape(-1, h, w, 1)
    images = images[:_MOST_IMAGES]
    low, high = float(images.min()), float(images.max())
    levels = ((images - low) / (high - low if high > low else 1.0) * 255).round().byte().numpy()
    across = math.ceil(math.sqrt(len(levels)))
    down = math.ceil(len(levels) / across)
    sheet = np.full((down * (h + 1) - 1, across * (w + 1) - 1, levels.shape[-1]), 128, np.uint8)
    for i, image in enumerate(levels):
        y, x = i // across * (h + 1), i % across * (w + 1)
        sheet[y : y + h, x : x + w] = image
    factor = max(1, _MOST_PIXELS // max(sheet.shape[:2]))
    pixels = sheet.repeat(factor, axis=0).repeat(factor, axis=1)
    return to_png(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def histograms_svg(tensors: Sequence[tuple[str, Tensor, bool]]) -> bytes:
    """One histogram below the other.

    Args:
        tensors: Name, finite values, and whether the axis is logarithmic, of each.
    """
    height = _HEIGHT * len(tensors)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (name, value, log) in enumerate(tensors):
        parts += _histogram(name, value, log, i * _HEIGHT)
    return "\n".join([*parts, "</svg>"]).encode()


def _histogram(name: str, value: Tensor, log: bool, top: int) -> list[str]:
    flat = value.detach().reshape(-1).to("cpu", torch.float64)
    scaled = flat.log10() if log else flat
    low, high = float(scaled.min()), float(scaled.max())
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(scaled, _BINS, low, high).tolist()
    left, bottom, most = _MARGIN, top + _HEIGHT - 34, max(counts)
    step, room = (_WIDTH - 2 * _MARGIN) / _BINS, _HEIGHT - 70
    title = f"{_cut(plain(name))}: {flat.numel():,} numbers" + (", logarithmic" if log else "")
    parts = [f'<text x="{left}" y="{top + 22}">{escape(title)}</text>']
    for i, count in enumerate(counts):
        tall = room * count / most
        if count:
            parts.append(
                f'<rect x="{left + i * step:.1f}" y="{bottom - tall:.1f}" width="{step - 1:.1f}" height="{tall:.1f}" '
                'fill="#4c78a8"/>'
            )
    end = _WIDTH - _MARGIN
    parts.append(f'<line x1="{left}" y1="{bottom}" x2="{end}" y2="{bottom}" stroke="#444"/>')
    parts.append(
        f'<text x="{left - 6}" y="{bottom - room + 4}" text-anchor="end">{int(most)}</text>'
    )
    for share in (0.0, 0.5, 1.0):
        at = low + share * (high - low)
        label = f"{10**at if log else at:.4g}"
        x = left + share * (end - left)
        parts.append(f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{label}</text>')
    return parts


def _cut(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
