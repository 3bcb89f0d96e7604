"""Looking for ``z = F(z)``. One loop, ``find_fixed_point``; one file per method."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count, is_number
from .._errors import ObjectiveError
from .._results import SUCCESS, Result, Status
from .._typing import Params

Map = Callable[[Params], Params]


@dataclass(frozen=True)
class FixedPointSolution:
    """Where a search for a fixed point ended.

    Attributes:
        point: ``z``. Detached.
        image: ``F(z)``, where the search has ended with it; else ``None``.
        num_steps: Evaluations of the map.
        residual: ``|F(z) - z| / |F(z)|`` when it was last evaluated; NaN without an evaluation.
        result: Success, or a sentence that says what to change.
    """

    point: Params
    image: Params | None
    num_steps: int
    residual: float
    result: Result = SUCCESS


@dataclass(frozen=True)
class AbstractFixedPointSolver(abc.ABC):
    """Settings of a method for ``z = F(z)``. Frozen; ``find_fixed_point`` runs it.

    Args:
        max_steps: At most this many evaluations of the map.
        rtol: Stop when ``|F(z) - z| <= rtol |F(z)|``; where ``rtol = atol = 0``, after exactly ``max_steps``.
        atol: Stop when ``|F(z) - z| <= atol``.
        relaxation: ``tau`` in (0, 1]: how much of the way from ``z`` to ``F(z)`` is gone; 1 for all of it. (It is called
            the damping factor in places.)
    """

    name: ClassVar[str]

    max_steps: int = 100
    rtol: float = 1e-5
    atol: float = 0.0
    relaxation: float = 1.0

    def __post_init__(self) -> None:
        label = type(self).__name__
        check_count(label, "max_steps", self.max_steps, 1)
        for tolerance in ("rtol", "atol"):
            value = getattr(self, tolerance)
            if not (is_number(value) and 0 <= value < math.inf):
                raise ValueError(f"{label} needs {tolerance} >= 0, got {value!r:.80}.")
        check_relaxation(label, self.relaxation)

    def num_samples(self, like: Params) -> int:
        """How many parts of the fixed point are solved independently."""
        return 1

    @abc.abstractmethod
    def init(self) -> Any:
        """The memory before the first step."""

    @abc.abstractmethod
    def step(self, point: Tensor, image: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """The next point: all are ``(samples, entries)``."""


def check_relaxation(owner: str, value: object) -> None:
    """Refuse anything but a number in (0, 1].

    Raises:
        ValueError: naming ``owner``.
    """
    if not (is_number(value) and 0 < value <= 1):  # type: ignore[operator]
        raise ValueError(
            f"{owner} needs relaxation above 0 and at most 1 (the whole step), got {value!r:.80}."
        )


class _Rows:
    """The layout of a dict of tensors as a matrix ``(samples, entries)`` in at least float32, and back."""

    def __init__(self, like: Params, num_samples: int) -> None:
        self._like = {k: (v.shape, v.dtype) for k, v in like.items()}
        self._samples = num_samples
        self._sizes = [v.numel() // self._samples for v in like.values()]
        self._dtype = torch.float32
        for v in like.values():
            self._dtype = torch.promote_types(self._dtype, v.dtype)

    def flatten(self, tree: Params) -> Tensor:
        rows = [tree[k].detach().reshape(self._samples, -1).to(self._dtype) for k in self._like]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def unflatten(self, matrix: Tensor) -> Params:
        parts = torch.split(matrix, self._sizes, dim=1)
        return {
            k: part.reshape(shape).to(dtype)
            for (k, (shape, dtype)), part in zip(self._like.items(), parts, strict=True)
        }


@torch.no_grad()
def find_fixed_point(
    solver: AbstractFixedPointSolver, function: Map, start: Params
) -> FixedPointSolution:
    """Look for ``z = F(z)`` from ``start``; counts, tolerances and the verdict are made here, for every method.

    Args:
        solver: The method.
        function: ``F``, from a dict of tensors to one of the same names and shapes. It is evaluated without a graph.
        start: ``z_0``.

    Raises:
        ObjectiveError: if ``F`` gives other names or shapes.
        RequirementError: if the method does not fit the shapes.
    """
    rows = _Rows(start, solver.num_samples(start))
    matrix, memory = rows.flatten(start), solver.init()
    exactly = solver.rtol == 0 and solver.atol == 0
    residual, first = math.nan, math.nan
    for count in range(1, solver.max_steps + 1):
        point = rows.unflatten(matrix)
        image = function(point)
        if count == 1:
            check_image(image, start)
        moved = rows.flatten(image)
        distance, size = float((moved - matrix).norm()), float(moved.norm())
        residual = distance / size if size > 0 else distance
        first = residual if count == 1 else first
        if not math.isfinite(distance):
            return FixedPointSolution(point, None, count, math.nan, _nonfinite(solver, count))
        if not exactly and distance <= max(solver.atol, solver.rtol * size):
            return FixedPointSolution(point, _tree.detach(image), count, residual)
        matrix, memory = solver.step(matrix, moved, memory)
    result = SUCCESS if exactly else _unconverged(solver, residual, first)
    return FixedPointSolution(rows.unflatten(matrix), None, solver.max_steps, residual, result)


def check_image(image: Params, start: Params) -> None:
    """Refuse a map from which no fixed point can come.

    Raises:
        ObjectiveError: saying how its result differs from its argument.
    """
    if not isinstance(image, dict) or image.keys() != start.keys():
        keys = sorted(map(str, image)) if isinstance(image, dict) else type(image).__name__
        raise ObjectiveError(
            f"The map was given a dict with the keys {sorted(start)} and returned {keys}; it must return what it is "
            f"given, one application further."
        )
    for k, v in start.items():
        shape = getattr(image[k], "shape", None)
        if shape != v.shape:
            found = type(image[k]).__name__ if shape is None else f"tensor of shape {tuple(shape)}"
            raise ObjectiveError(
                f"The map was given a tensor{f' {k!r}' if k else ''} of shape {tuple(v.shape)} and returned a {found}; a "
                f"fixed point needs a map from a space to itself."
            )
        if image[k].dtype != v.dtype and not (
            torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled(v.device.type)
        ):
            raise ObjectiveError(
                f"The map was given a tensor of {v.dtype} and returned one of {image[k].dtype}; start from a z0 of the "
                f"dtype that it returns."
            )


def _nonfinite(solver: AbstractFixedPointSolver, count: int) -> Result:
    return Result(
        Status.NONFINITE,
        f"{type(solver).__name__} met NaN or infinite values at evaluation {count} of the map: there it is no "
        f"contraction. Lower relaxation, or bound the map (a normalization, smaller weights).",
    )


def _unconverged(solver: AbstractFixedPointSolver, residual: float, first: float) -> Result:
    label = type(solver).__name__
    said = (
        f"{label} stopped after {solver.max_steps} evaluations of the map at a relative residual of {residual:.1e} (asked "
        f"for rtol={solver.rtol:.1e}, atol={solver.atol:.1e}"
    )
    if residual < 0.1 * first:
        return Result(
            Status.MAX_STEPS_REACHED,
            f"{said}; it began at {first:.1e}); raise max_steps or loosen rtol.",
        )
    other = "Anderson()" if label == "Picard" else "a larger memory"
    return Result(
        Status.MAX_STEPS_REACHED,
        f"{said}; it began at {first:.1e}, so it hardly falls): the map is no contraction there, or not the same at every "
        f"evaluation (dropout). Use {other}, lower relaxation, or bound the map (a normalization, smaller weights).",
    )
