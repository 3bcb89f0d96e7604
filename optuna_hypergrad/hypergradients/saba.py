"""SOBA with variance reduction by tables of past gradients (SAGA)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .._arguments import check_budget, check_count
from .._errors import RequirementError
from .._typing import Params
from ..inner import AbstractInnerSolver
from ..operators import Flattener
from ..problem import BilevelProblem, full_batch, same_batch
from ._estimate import EstimatorState
from ._outer_gradients import combine
from ._single_loop import AbstractSingleLoop, Derivatives, Directions, derivatives

_INNER = ("slope", "product", "indirect")
_OUTER = ("cotangent", "direct")


@dataclass(frozen=True)
class SABA(AbstractSingleLoop):
    """SOBA with each of its five directions replaced by ``new_i - table_i + mean(table)``: steps of constant length do.

    The inner objective is the mean of ``g`` over ``num_inner_batches`` batches, ``inner_batch(0)`` to
    ``inner_batch(n - 1)``, and the outer one likewise. Step ``t`` sees one of each, drawn by ``(seed, t)`` alone; the
    batches that ``minimize_bilevel`` asks for elsewhere go round (``inner_batch=lambda t: batches[t % n]``). Under
    strong convexity the error falls linearly, with ``rho`` of order ``1 / L_max``, ``L_max`` the largest curvature of a
    single batch. As the first step, all batches are seen once, to fill the tables. ``lr`` of ``torch.optim.SGD``
    is the paper's ``gamma``.

    The tables hold ``n (2 P + N) + m (P + N)`` numbers. They are updated in place: a state can be gone on from
    once, and is refused afterwards.

    Reference: Dagreou, Ablin, Vaiter & Moreau (2022), "A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms", section 2.2; Defazio, Bach & Lacoste-Julien (2014), "SAGA".

    Args:
        num_inner_batches: ``n``.
        num_outer_batches: ``m``.
        seed: Of the draws.
        memory_budget: Bytes that the tables may take.
    """

    name: ClassVar[str] = "saba"
    requires: ClassVar[frozenset[str]] = frozenset({"second_derivatives", "cyclic_batches"})

    num_inner_batches: int = field(kw_only=True)
    num_outer_batches: int = field(kw_only=True)
    seed: int = field(default=0, kw_only=True)
    memory_budget: float = field(default=256e6, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("SABA", "num_inner_batches", self.num_inner_batches, 1)
        check_count("SABA", "num_outer_batches", self.num_outer_batches, 1)
        check_count("SABA", "seed", self.seed, 0)
        check_budget("SABA", self.memory_budget)

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        super().check(problem, inner_solver, inner_params, outer_params)
        n, m = self.num_inner_batches, self.num_outer_batches
        p, q = Flattener(inner_params), Flattener(outer_params)
        of_p, of_q = (torch.finfo(x.dtype).bits // 8 * x.size for x in (p, q))
        needed = n * (2 * of_p + of_q) + m * (of_p + of_q)
        if needed > self.memory_budget:
            raise RequirementError(
                f"SABA keeps tables of {n} x (2 x {p.size:,} + {q.size:,}) + {m} x ({p.size:,} + {q.size:,}) numbers, "
                f"{needed / 1e6:,.1f} MB, and memory_budget is {self.memory_budget / 1e6:,.1f} MB: cut the data into fewer "
                f"and larger batches, raise memory_budget, or use MASOBA, which keeps none."
            )
        for label, batch_of, size in (
            ("inner_batch", problem.inner_batch, n),
            ("outer_batch", problem.outer_batch, m),
        ):
            if batch_of is full_batch and size > 1:
                raise RequirementError(
                    f"SABA(num_{label}es={size}) draws from {size} batches, and the problem has no {label}; give it "
                    f"one (step -> batch, with the batches going round), or num_{label}es=1."
                )
            if not same_batch(batch_of(0), batch_of(size)):
                raise RequirementError(
                    f"SABA(num_{label}es={size}) needs batches that go round, and {label}(0) and {label}({size}) "
                    f"differ; write it as lambda step: batches[step % {size}]."
                )

    def _directions(
        self,
        problem: BilevelProblem,
        inner_params: Params,
        outer_params: Params,
        v: Tensor,
        step: int,
        count: int,
        state: EstimatorState,
    ) -> Directions:
        n, m = self.num_inner_batches, self.num_outer_batches
        on = functools.partial(derivatives, problem, inner_params, outer_params, v)
        layout, outer = Flattener(inner_params), Flattener(outer_params)
        if count == 0:
            tables = self._filled(on, layout, outer)
        else:
            tables = dict(state.tensors)
            if int(tables["written"]) != count:
                raise RequirementError(
                    f"SABA was given the state after step {count}, whose tables are those of step "
                    f"{int(tables['written'])}: they are updated in place, so a state is gone on from only once. "
                    f"Clone its tensors to go on from it twice."
                )
        i, j = _draw(self.seed, count, (n, m))
        seen = on(i, j, False)
        rows = _rows(seen, layout, outer)
        found: dict[str, Tensor] = {}
        for names, index, size in ((_INNER, i, n), (_OUTER, j, m)):
            for name in names:
                table, mean = tables[f"table/{name}"], tables[f"mean/{name}"]
                change = rows[name] - table[index]
                found[name] = mean + change
                table[index] = rows[name]
                # Added up anew once in a while, lest it drift from the table by rounding.
                again = (count + 1) % size == 0
                tables[f"mean/{name}"] = (
                    table.mean(0) if again else mean.add(change, alpha=1 / size)
                )
        tables["written"].fill_(count + 1.0)
        combine(seen.direct, seen.indirect, outer_params, "SABA", self.sees)
        value = outer.unflatten(found["direct"] + found["indirect"])
        return Directions(
            seen.inner_value,
            seen.outer_value,
            layout.unflatten(found["slope"]),
            found["product"],
            found["cotangent"],
            value,
            tables,
        )

    def _filled(
        self, on: functools.partial[Derivatives], layout: Flattener, outer: Flattener
    ) -> Params:
        """Tables of all batches at the first point."""
        n, m = self.num_inner_batches, self.num_outer_batches
        tables: Params = {}
        for index in range(max(n, m)):
            rows = _rows(on(index % n, index % m, index == 0), layout, outer)
            for names, size in ((_INNER, n), (_OUTER, m)):
                for name in names:
                    row = rows[name]
                    if index == 0:
                        tables[f"table/{name}"] = row.new_empty(size, len(row))
                    if index < size:
                        tables[f"table/{name}"][index] = row
        for name in (*_INNER, *_OUTER):
            tables[f"mean/{name}"] = tables[f"table/{name}"].mean(0)
        tables["written"] = torch.zeros((), dtype=torch.float64, device="cpu")
        return tables


def _rows(seen: Derivatives, layout: Flattener, outer: Flattener) -> dict[str, Tensor]:
    """The five directions as vectors."""

    def flat(parts: dict[str, Tensor | None]) -> Tensor:
        given = zip(parts.values(), outer.shapes, outer.dtypes, strict=True)
        return outer.flatten(
            [torch.zeros(s, dtype=d, device=outer.device) if p is None else p for p, s, d in given]
        )

    return {
        "slope": layout.flatten(seen.slope),
        "product": seen.product,
        "indirect": flat(seen.indirect),
        "cotangent": seen.cotangent,
        "direct": flat(seen.direct),
    }


def _draw(seed: int, count: int, sizes: tuple[int, int]) -> tuple[int, int]:
    """One number below each of ``sizes``."""
    words = np.random.SeedSequence((seed, count)).generate_state(2, np.uint64)
    return int(words[0]) % sizes[0], int(words[1]) % sizes[1]
