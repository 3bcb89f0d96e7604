"""MA-SOBA in random subspaces of the inner parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from .. import _tree
from .._arguments import check_count, is_number
from .._errors import RequirementError
from .._typing import Params
from ..inner import AbstractInnerSolver, AbstractStepSolver, GradientDescent, HeavyBall
from ..inner._base import verdict
from ..inner._settings import Value
from ..operators import scalar
from ..problem import BilevelProblem
from ._estimate import Cotangents, EstimatorState, HypergradientEstimate
from ._outer_gradients import _finite, _first_failure, combine
from ._pace import paced
from ._penalty import part
from ._single_loop import AbstractOneStep, check_theta, moving_average, single_step, steps_taken
from ._sketched_action import SketchedAction, bi_probe, two_sketch
from ._sketches import (
    SKETCH_LAWS,
    Sketch,
    Sketches,
    SketchLaw,
    draw,
    rank_of,
    sketched_gradient,
    sketched_products,
)

Correction = Literal["one_sided", "bi_probe", "two_sketch"]
CORRECTIONS: tuple[Correction, ...] = ("one_sided", "bi_probe", "two_sketch")


@dataclass(frozen=True)
class BROS(AbstractOneStep):
    """MA-SOBA whose ``w`` and ``v`` move in random subspaces, drawn anew every ``refresh`` steps.

    For each block ``W`` (``m x n``) of the inner parameters a ``P`` (``m x r``) with ``E[P P^T] = I``; vectors are left
    whole. With coordinates ``B`` around ``W``, ``g~(B) = g(W + P B)``::

        w <- w - beta P dg~/dB ;  v <- v - gamma (P C - P P^T f_w) ;  h <- (1-theta) h + theta (f_lam - M^T v)

    where ``P C`` is an unbiased estimate of ``H v``. (``P P^T H P P^T v`` is not one.) Its ``correction``:

    * ``"one_sided"``: ``P P^T H v``: the tangent is ``v``, and what is differentiated in reverse is projected. Unbiased for
      all laws and ranks; the only one whose noise vanishes at the solution; ``M^T v`` is exact, and free.
    * ``"bi_probe"``: ``r/(r-1) P [M c - e * M (e * c)]``, ``c = P^T v``, ``M = P^T H P``, ``e`` random signs, the same in all
      blocks. Unbiased if the columns of ``P`` are independent (not ``"orthonormal"``) and all blocks have one rank
      >= 2. Two passes, and a third one where there are vectors. ``M^T P P^T v``.
    * ``"two_sketch"``: ``P P^T H R R^T v`` with another, independent ``R``. Unbiased for all laws and ranks. ``M^T R R^T v``.

    **A reconstruction.** The paper has no public code, and this was written from its abstract: subspaces for the lower and
    the auxiliary update, and a Rademacher bi-probe correction that makes the Hessian's action unbiased, in the loop of
    MA-SOBA. Which sides are projected, ``"one_sided"`` and ``"two_sketch"``, the step sizes and the forms above are ours;
    ``"bi_probe"`` is what we take the paper's correction to be. The figures of the paper may not carry over.

    Step sizes are those of MA-SOBA: block by block they are multiplied by ``r/m``, those of ``v`` by its square where the
    correction's noise stays. Where ``r`` is well above the number of samples in a batch (of tokens, of positions), a step
    does to a layer's outputs what one in the whole space does: with ``rank`` as a fraction, both step sizes over ``rank``
    then follow MA-SOBA step by step. (Not with vectors among the blocks: theirs are not multiplied.) The inner solver is
    ``GradientDescent``, or ``HeavyBall``, whose velocity is kept in the subspace (``r x n``) and begins anew with it.

    Memory, beside activations: ``w`` before and after the step, ``v``, which is updated in place (so that a state can be
    gone on from once, and is refused afterwards), and ``r (m + n)`` numbers a block; ``r (m + 3 n)`` before the step of ``w``
    is made. Hessian products are taken in reverse over forward mode, without a double-backward graph, and the gradient of
    one block at a time exists in full before it is projected. ``"bi_probe"`` and ``"two_sketch"`` form a tangent of the size
    of ``w``. ``inner_objective`` is evaluated once a step, or up to three times: random numbers in it come from the batch.

    References: Zhang & al. (2026), "BROS" (randomized subspaces for bilevel optimization), of which the abstract;
    Chen, Xiao & Balasubramanian (2023), "Optimal algorithms for stochastic bilevel optimization under relaxed smoothness
    conditions".

    Args:
        rank: ``r``, or as a float the fraction of rows, in (0, 1], rounded up.
        correction: See above.
        law: Of ``P``: ``"gaussian"``, ``"rademacher"`` or ``"orthonormal"`` (scaled by ``sqrt(m/r)``).
        refresh: Steps between draws.
        theta: As for :class:`MASOBA`.
        seed: Of the draws.
        share: What the step sizes of a block in a subspace are multiplied by (those of ``v`` by its square where the
            correction's noise stays): ``None`` for ``r/m``. With a number, the step sizes are those of blocks that are whole.
        whole: Names of matrices that are left whole like vectors: narrow ones (embeddings, heads), which take little
            memory and of which a subspace holds few directions.
    """

    name: ClassVar[str] = "bros"
    requires: ClassVar[frozenset[str]] = frozenset({"second_derivatives", "forward_ad"})

    rank: int | float = field(default=0.25, kw_only=True)
    correction: Correction = field(default="one_sided", kw_only=True)
    law: SketchLaw = field(default="gaussian", kw_only=True)
    refresh: int = field(default=1, kw_only=True)
    theta: float = field(default=0.1, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    share: float | None = field(default=None, kw_only=True)
    whole: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def resumed_as(self) -> str:
        return f"BROS(whole={self.whole!r}, share={self.share!r})"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_theta("BROS", self.theta)
        check_count("BROS", "refresh", self.refresh, 1)
        check_count("BROS", "seed", self.seed, 0)
        counted = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not (is_number(self.rank) and (self.rank >= 1 if counted else 0 < self.rank <= 1)):
            raise ValueError(
                f"BROS needs rank to be an integer >= 1, or a fraction of the rows in (0, 1] as a float, got {self.rank!r:.80}."
            )
        for label, given, known in (
            ("correction", self.correction, CORRECTIONS),
            ("law", self.law, SKETCH_LAWS),
        ):
            if given not in known:
                named = ", ".join(repr(k) for k in known)
                raise ValueError(f"BROS needs {label} to be one of {named}, got {given!r:.80}.")
        if not (self.share is None or (is_number(self.share) and 0 < self.share < math.inf)):
            raise ValueError(
                f"BROS needs share to be a finite number > 0, or None for r/m, got {self.share!r:.80}."
            )
        if not (isinstance(self.whole, tuple) and all(isinstance(k, str) for k in self.whole)):
            raise ValueError(
                f"BROS needs whole to be a tuple of names of inner parameters, whole=('embed',), got {self.whole!r:.80}."
            )
        if self.correction == "bi_probe":
            if self.law == "orthonormal":
                raise ValueError(
                    "BROS: bi_probe is unbiased for sketches of independent columns only, and those of "
                    "law='orthonormal' depend on each other (a bias of about 0.7 of H v); use law='gaussian' or "
                    "'rademacher', or correction='one_sided' or 'two_sketch'."
                )
            if not counted or self.rank < 2:
                raise ValueError(
                    f"BROS: bi_probe needs one rank >= 2 for all blocks, as an integer (rank=8), got rank={self.rank!r}."
                )

    def check(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
    ) -> None:
        super().check(problem, inner_solver, inner_params, outer_params)
        unknown = sorted(set(self.whole) - inner_params.keys())
        if unknown:
            raise RequirementError(
                f"BROS is to leave {', '.join(map(repr, unknown))} whole, and there is no such inner parameter; whole= takes "
                f"names out of {', '.join(map(repr, inner_params))!s:.300}."
            )
        ranks = [
            rank_of("BROS", k, v.shape, self.rank)
            for k, v in inner_params.items()
            if k not in self.whole
        ]
        if all(r is None for r in ranks):
            besides = " but those that whole= names" if self.whole else ""
            raise RequirementError(
                f"BROS finds no matrix among the inner parameters{besides}, and leaves vectors whole; use MASOBA."
            )
        plain = (
            isinstance(inner_solver, (GradientDescent, HeavyBall)) and inner_solver.max_norm is None
        )
        if not plain:
            raise RequirementError(
                f"BROS moves w in subspaces, by plain descent or with a velocity in them, and was given "
                f"{type(inner_solver).__name__}; pass GradientDescent(..., max_steps=1) or HeavyBall(..., max_steps=1), "
                f"without max_norm."
            )
        if (
            isinstance(inner_solver, HeavyBall)
            and inner_solver.momentum != 0.0
            and self.refresh == 1
        ):
            raise RequirementError(
                "BROS keeps the velocity of HeavyBall in the subspace, where it begins anew with every draw: with refresh=1 "
                "it would have no effect. Give refresh= (10, say), or use GradientDescent."
            )

    def estimate(
        self,
        problem: BilevelProblem,
        inner_solver: AbstractInnerSolver | None,
        inner_params: Params,
        outer_params: Params,
        step: int = 0,
        state: EstimatorState | None = None,
    ) -> HypergradientEstimate:
        solver = single_step("BROS", inner_solver)
        state = EstimatorState() if state is None else state
        count, index = steps_taken("BROS", state), state.inner_index
        w = _tree.detach(inner_params)
        v = _carried(state, w, count)
        sketches = self._drawn(count, 0, w)
        outer_value, cotangent, direct = _outer(problem, w, outer_params, step, sketches)
        inner_value, slope, product, mixed = self.action(
            problem, w, outer_params, v, count, index, sketches
        )

        eta = self._step_size(solver, outer_params, index, count)
        pace = paced("BROS", eta, self._measured(v, product, sketches), state.numbers)
        scale = float(_tree.norm(cotangent))
        # Before v is moved: a step that breaks off here leaves a state that is refused.
        written = state.tensors.get("written", torch.zeros((), dtype=torch.float64, device="cpu"))
        written.fill_(count + 1.0)
        square = 0.0
        for k, x in v.items():
            by = -pace.step_size * self._share(sketches, k)
            if self.damping:
                x.mul_(1.0 + by * self.damping)
            gap = product.pop(k) - cotangent.pop(k)  # gone before the next w comes
            square += float(_tree.dot({k: gap}, {k: gap}))
            sketches[k].move(x, gap, by)
        del gap
        after_w, velocity = self._descended(solver, w, outer_params, slope, sketches, count, state)

        indirect = {k: None if c is None else -c for k, c in mixed.items()}
        value = combine(direct, indirect, outer_params, "BROS", self.sees)
        value, average = moving_average(value, state, self.theta)
        result = _first_failure(
            verdict(solver, after_w, float(inner_value), math.nan, True),
            pace.result,
            _finite(value, outer_value),
        )
        tensors = {"written": written, **{f"v/{k}": x for k, x in v.items()}}
        tensors |= {f"velocity/{k}": x for k, x in velocity.items()} | average
        return HypergradientEstimate(
            value,
            outer_value,
            after_w,
            result,
            {
                "num_inner_steps": 1.0,
                "residual": math.sqrt(square) / scale if scale > 0 else math.nan,
                "step_size": pace.step_size,
            },
            EstimatorState(index + 1, None, tensors, {**pace.numbers, "count": count + 1.0}),
        )

    def action(
        self,
        problem: BilevelProblem,
        inner_params: Params,
        outer_params: Params,
        v: Params,
        count: int,
        inner_index: int,
        sketches: Sketches,
    ) -> SketchedAction:
        """The corrected action of the Hessian on ``v`` at step ``count``, and what comes with it."""
        batch = problem.inner_batch(inner_index)

        def along(tangent: Params, slope: bool) -> SketchedAction:
            found = sketched_products(
                problem.inner_objective, inner_params, outer_params, batch, tangent, sketches, slope
            )
            return SketchedAction(found.value, found.slope, found.product, found.mixed)

        if self.correction == "one_sided":
            return along(v, True)
        if self.correction == "two_sketch":
            return two_sketch(along, v, self._drawn(count, 1, inner_params))
        return bi_probe(along, v, sketches, int(self.rank), (self.seed, count, 2))

    def _drawn(self, count: int, salt: int, inner_params: Params) -> Sketches:
        """One function of the seed and the step."""
        key = (self.seed, count // self.refresh, salt)
        return draw("BROS", self.law, self.rank, key, inner_params, self.whole)

    def _share_of(self, sketch: Sketch) -> float:
        """What the step size of a block of ``w`` is multiplied by."""
        known = sketch.basis is None or self.share is None
        return sketch.share if known else cast(float, self.share)

    def _share(self, sketches: Sketches, name: str) -> float:
        """What the step size of a block of ``v`` is multiplied by."""
        share = self._share_of(sketches[name])
        return share if self.correction == "one_sided" else share**2

    def _measured(
        self, v: Params, product: Params, sketches: Sketches
    ) -> tuple[float, float, float]:
        """``v.v``, ``v.Hv`` and ``Hv.Hv`` of the scaled action on ``v``, damping included."""
        vv = vh = hh = 0.0
        for k, x in v.items():
            share, own = self._share(sketches, k), float(x.square().sum())
            across = float((sketches[k].down(x) * product[k]).sum())
            vv += own
            vh += share * (across + self.damping * own)
            square = sketches[k].square(product[k])
            hh += share**2 * (square + 2 * self.damping * across + self.damping**2 * own)
        return vv, vh, hh

    def _descended(
        self,
        solver: AbstractStepSolver,
        w: Params,
        outer_params: Params,
        slope: Params,
        sketches: Sketches,
        count: int,
        state: EstimatorState,
    ) -> tuple[Params, Params]:
        """``w`` after a step along ``P B``, and the velocity ``B`` where there is one."""
        index = state.inner_index
        direction, velocity = slope, {}
        if isinstance(solver, HeavyBall) and solver.momentum != 0.0:
            beta = _number("momentum", solver.setting("momentum", outer_params, index))
            before = part(state.tensors, "velocity/")
            begun = count % self.refresh == 0
            velocity = {
                k: b
                if k not in before or (begun and sketches[k].basis is not None)
                else b.add(before[k], alpha=beta)
                for k, b in slope.items()
            }
            direction = velocity
            if solver.nesterov:
                direction = {k: b.add(velocity[k], alpha=beta) for k, b in slope.items()}
        eta = _number("step_size", solver.setting("step_size", outer_params, index))
        moved = {
            k: s.moved(w[k], direction[k], -eta * self._share_of(s)) for k, s in sketches.items()
        }
        return moved, velocity


def _carried(state: EstimatorState, inner_params: Params, count: int) -> Params:
    """``v``, by block, to be changed in place.

    Raises:
        RequirementError: if that has been done already.
    """
    found = part(state.tensors, "v/")
    if not found:
        return {
            k: torch.zeros_like(x, memory_format=torch.contiguous_format)
            for k, x in inner_params.items()
        }
    written = int(state.tensors["written"])
    if written != count:
        raise RequirementError(
            f"BROS was given the state after step {count}, whose v is that of step {written}: it is "
            f"updated in place, so a state is gone on from only once. Clone its tensors to go on from it twice."
        )
    return found


def _number(label: str, value: Value) -> float:
    if isinstance(value, dict):
        raise RequirementError(
            f"BROS needs one {label} for all inner parameters, and that of the inner solver is a factor for each."
        )
    return float(value)


def _outer(
    problem: BilevelProblem,
    inner_params: Params,
    outer_params: Params,
    step: int,
    sketches: Sketches,
) -> tuple[Tensor, Params, Cotangents]:
    """``f``, ``P^T f_w`` and ``f_lam``."""
    w, lam = _tree.leaves(inner_params), _tree.leaves(outer_params)
    with torch.enable_grad():
        value = scalar(
            problem.outer_objective(dict(w), dict(lam), problem.outer_batch(step)),
            "outer_objective",
        )
        cotangent, direct = sketched_gradient(value, w, lam, sketches)
    return value.detach(), cotangent, direct
