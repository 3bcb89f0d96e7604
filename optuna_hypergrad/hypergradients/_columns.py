"""How many columns of tangents fit into memory, and what is refused before there are any."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_budget, check_count
from .._errors import RequirementError
from .._twice import saying_what_has_no_derivative
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, InnerSolution
from ..inner._base import InnerState
from ..operators import scalar
from ..problem import BilevelProblem
from ._memory import at_least, num_bytes, storages, with_saved_storages
from ._rewind import NOT_REPEATED, Point, meets

_UNLIMITED = 1e18
"""Bytes: a budget of infinity, as a number that can be divided."""


def check_step_solver(label: str, inner_solver: AbstractInnerSolver | None) -> AbstractStepSolver:
    """The solver, whose steps can be differentiated.

    Raises:
        RequirementError: if they cannot, if there are none, or if there is no solver.
    """
    if inner_solver is None:
        raise RequirementError(
            f"{label} differentiates the steps of an inner solver, and none was given; pass inner_solver=, or "
            f"use Implicit at a solution found elsewhere."
        )
    if not isinstance(inner_solver, AbstractStepSolver):
        raise RequirementError(
            f"{label} cannot differentiate {type(inner_solver).__name__}: it has no steps without branches on "
            f"values. Use ZerothOrder or (where there is an inner objective) Implicit with it, or a step "
            f"solver (GradientDescent, HeavyBall, Adam) with {label}."
        )
    if inner_solver.max_steps < 1:
        raise RequirementError(
            f"{label} needs at least one inner step to differentiate; raise max_steps."
        )
    return inner_solver


def check_width(label: str, width: int | None, memory_budget: float) -> None:
    """Raise ``ValueError`` for settings that mean nothing."""
    check_count(label, "width", width, 1, none=True)
    check_budget(label, memory_budget)


def width_of(width: int | None, inner_params: Params) -> int:
    """``width``; by default 8, and up to 64 where ``w`` is so small that the calls take the time."""
    if width is not None:
        return width
    return min(64, max(8, 2**20 // max(_tree.num_entries(inner_params), 1)))


@dataclass(frozen=True)
class Room:
    """How many columns fit: carried at once, and pushed at once."""

    carried: int
    width: int


def room(
    problem: BilevelProblem,
    solver: AbstractStepSolver,
    inner_params: Params,
    outer_params: Params,
    state: InnerState | None,
    index: int,
    width: int,
    budget: float,
    label: str,
) -> Room:
    """What fits into ``budget`` bytes beside ``w`` and ``lam``; takes a gradient at ``w_0`` to know.

    Raises:
        RequirementError: if not one column does.
    """
    start = Point(inner_params, solver.init(inner_params) if state is None else state)
    graph = graph_bytes(problem, inner_params, outer_params, index)
    moving = num_bytes(start.tensors())
    column = moving + num_bytes(outer_params.values())
    working = column + 2 * num_bytes(inner_params.values()) + graph
    left = min(budget, _UNLIMITED) - graph - moving
    width = min(width, int(max(left, 0) // (column + working)))
    if width < 1:
        raise RequirementError(
            f"{label}(memory_budget={budget:.3g}) bytes cannot hold one column of tangents ({column / 1e6:.3g} "
            f"MB) beside the graph of a step ({graph / 1e6:.3g} MB) and what one column takes while it moves "
            f"({working / 1e6:.3g} MB). Raise memory_budget to {at_least(graph + moving + column + working)}, give the "
            f"inner objective smaller batches, or use Unroll."
        )
    return Room(int((left - width * working) // column), width)


def passes(columns: range, width: int, room: Room) -> list[list[range]]:
    """For each run of the trajectory, the blocks of columns that it carries.

    A block never crosses a multiple of ``width``, so how columns are batched does not depend on where
    ``columns`` begins, as long as that is at such a multiple.
    """
    blocks = [
        range(i, min(i + room.width, end))
        for start in range(columns.start, columns.stop, width)
        for end in [min(start + width, columns.stop)]
        for i in range(start, end, room.width)
    ]
    planned: list[list[range]] = []
    free = 0
    for block in blocks:
        if not planned or len(block) > free:
            planned.append([])
            free = room.carried
        planned[-1].append(block)
        free -= len(block)
    return planned


def check_repeated(
    label: str, again: InnerSolution, first: InnerSolution, inner_params: Params
) -> None:
    """Refuse columns along another trajectory than the first one.

    Raises:
        RequirementError: saying what makes them differ.
    """
    same = again.num_steps == first.num_steps
    if not (same and meets(again.inner_params, first.inner_params, inner_params)):
        raise RequirementError(
            f"{label} ran the inner problem again for further columns, which do not all fit into memory_budget, and it "
            f"ended elsewhere: {NOT_REPEATED} Or raise memory_budget, so that one run is enough."
        )


def contract(cotangent: Params, columns: Params) -> Tensor:
    """``<cotangent, column>`` for each column: ``(B,)``, in float64 on the CPU."""
    rows = len(next(iter(columns.values())))
    parts = [columns[k].reshape(rows, -1) @ c.reshape(-1) for k, c in cotangent.items()]
    return torch.stack([p.to("cpu", torch.float64) for p in parts]).sum(0)


def graph_bytes(
    problem: BilevelProblem, inner_params: Params, outer_params: Params, index: int
) -> int:
    """What the graph of ``(g_w, g_lam)`` keeps alive, and no other one does: not ``w``, ``lam`` or data."""
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    at = (*w.values(), *lam.values())

    def build() -> list[Tensor]:
        with torch.enable_grad():
            with saying_what_has_no_derivative("inner_objective"):
                value = problem.inner_objective(dict(w), dict(lam), problem.inner_batch(index))
            value = scalar(value, "inner_objective")
            if not value.requires_grad:
                return []
            found = torch.autograd.grad(value, at, create_graph=True, allow_unused=True)
        return [value, *(g for g in found if g is not None)]

    def measured() -> tuple[list[Tensor], dict[int, int]]:
        alive, held = with_saved_storages(build, lambda ends: ends)
        return alive, held | storages(alive[1:])

    alive, shared = measured()
    _, held = measured()  # what lies where it lay for the first one, which is alive, is not its own
    del alive
    return sum(n for address, n in held.items() if address not in shared)
