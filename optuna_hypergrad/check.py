"""Is this hypergradient right? Finite differences with the inner problem solved again, along several directions."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from . import _tree
from ._arguments import check_count, is_number
from ._differences import directional_derivative, noise_level
from ._errors import HypergradError, RequirementError, SolverError
from ._typing import Params
from .hypergradients import (
    AbstractDirectionalEstimator,
    AbstractHypergradientEstimator,
    Auto,
    TwoPhase,
    ZerothOrder,
    hypergradient,
)
from .hypergradients._base import outer_value_at
from .inner import AbstractInnerSolver, inner_solve
from .operators import Hessian
from .problem import BilevelProblem

_NOISY = 0.1
"""Relative uncertainty from which nothing is concluded from agreement."""
_USELESS = 0.5
"""Relative uncertainty of a finite difference from which nothing is concluded at all."""
_NEGLIGIBLE = 1e-6
"""Of the largest derivative (along directions in proportion to the hyperparameters)."""
_SEEDS_APART = 1_000_003
ALL = "(all together)"


@dataclass(frozen=True)
class DirectionCheck:
    """One direction: what finite differences say, and what the estimator does.

    Attributes:
        hyperparameter: The only one that the direction moves, or ``"(all together)"``.
        finite_difference: Derivative of ``f(w(lam), lam)`` along it.
        uncertainty: Of the finite difference, by its own account.
        estimate: The estimated hypergradient times the direction.
        standard_error: Of ``estimate``, where there were several estimates; else 0, or infinite if it is random.
        relative_error: The difference of the two, relative to the larger one.
        verdict: ``"unclear"`` where uncertainties are too large to tell.
    """

    hyperparameter: str
    finite_difference: float
    uncertainty: float
    estimate: float
    standard_error: float
    relative_error: float
    verdict: Literal["right", "wrong", "unclear"]


@dataclass(frozen=True)
class HypergradientReport:
    """What :func:`check_hypergradient` found. Truthy unless an estimate is wrong; ``print`` it.

    Attributes:
        rows: By direction.
        diagnosis: In words, what is wrong and what to do.
        notes: What else to know.
        rtol: Relative errors up to here are taken for right.
    """

    rows: tuple[DirectionCheck, ...]
    diagnosis: str
    rtol: float
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """No direction contradicts the estimate."""
        return all(r.verdict != "wrong" for r in self.rows)

    @property
    def conclusive(self) -> bool:
        """The finite differences were good enough to tell, in all directions."""
        return all(r.verdict != "unclear" for r in self.rows)

    @property
    def max_relative_error(self) -> float:
        """Over the directions that are clear; NaN if none is."""
        return max(
            (r.relative_error for r in self.rows if r.verdict != "unclear"), default=math.nan
        )

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = ("direction", "finite difference", "estimate", "relative error", "")
        lines = [head, *map(_cells, self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = [
            "  ".join(
                cell.ljust(width) if i in (0, 4) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*table, self.diagnosis, *(f"Note: {n}" for n in self.notes)])

    def raise_if_wrong(self) -> None:
        """Raise :class:`RequirementError` with the whole report, unless it is ``ok``."""
        if not self.ok:
            raise RequirementError(f"The hypergradient is wrong.\n{self}")


def check_hypergradient(
    problem: BilevelProblem,
    inner_params: Params,
    outer_params: Params,
    *,
    estimator: AbstractHypergradientEstimator,
    inner_solver: AbstractInnerSolver | None = None,
    reference_solver: AbstractInnerSolver | None = None,
    num_directions: int = 2,
    num_estimates: int = 1,
    rtol: float = 1e-3,
    step: int = 0,
    seed: int = 0,
    throw: bool = False,
) -> HypergradientReport:
    """Compare an estimator with finite differences of ``f(w(lam), lam)``, the inner problem solved again.

    Central differences, extrapolated from three to ten step sizes (Ridders 1982), with two inner solves for each: along one
    direction for each hyperparameter, so that the report says which one is wrong, and along ``num_directions`` that
    move all of them. Directions are random, and lean towards the estimate, so that the derivative is not small.

    Unrolling differentiates the inner *iterate*; implicit differentiation the *solution*: there, the inner solver (or
    ``reference_solver``) must come close to it, or the difference is reported as an error.

    Args:
        problem: Objectives and batches.
        inner_params: ``w_0``, from which all inner solves start.
        outer_params: ``lam``. Use float64: in float32 a difference has two or three digits, and the report says so.
        estimator: What is checked. Where it has a ``seed``, each of several estimates gets another one.
        inner_solver: As for :func:`hypergradient`.
        reference_solver: Solves the inner problem for the finite differences; ``inner_solver`` by default.
        num_directions: That move all hyperparameters at once.
        num_estimates: How many estimates are averaged: for estimators that are random. A third of them is used up to
            choose the directions.
        rtol: A relative error up to here is taken for right.
        step: Index of the outer batch.
        seed: Of the directions.
        throw: Raise if an estimate is wrong.

    Raises:
        RequirementError: if the estimator cannot be used, if there is no solver for the finite differences, or if an
            estimate is wrong and ``throw`` is set.
        SolverError: if the estimate is not finite.
    """
    for label, number, low in (
        ("num_directions", num_directions, 0),
        ("num_estimates", num_estimates, 1),
        ("step", step, 0),
    ):
        check_count("check_hypergradient", label, number, low)
    if not (is_number(rtol) and 0 < rtol < 1):
        raise ValueError(f"check_hypergradient needs rtol between 0 and 1, got {rtol!r:.80}.")
    if not isinstance(estimator, AbstractHypergradientEstimator):
        raise RequirementError(
            f"check_hypergradient checks an estimator such as Implicit() or Unroll(), not {estimator!r:.80}."
        )
    solver = reference_solver or inner_solver
    if solver is None:
        raise RequirementError(
            "Finite differences solve the inner problem again, and no solver was given; pass inner_solver=, or, for an "
            "estimator at a solution found elsewhere, reference_solver=."
        )

    estimates, notes = [], []
    for i in range(num_estimates):
        found = hypergradient(
            problem,
            inner_params,
            outer_params,
            estimator=_with_seed(estimator, i),
            inner_solver=inner_solver,
            step=step,
            throw=False,
        )
        if not _tree.all_finite(found.value):
            raise SolverError(
                f"There is no estimate to check. {found.result.message or 'It is not finite.'}",
                found.result,
            )
        if not found.result and found.result.message not in notes:
            notes.append(found.result.message)
        estimates.append({k: v.double() for k, v in found.value.items()})
    epsilon = max(
        torch.finfo(v.dtype).eps for v in (*inner_params.values(), *outer_params.values())
    )
    if epsilon > 1e-10:
        notes.append(
            "inner_params or outer_params are not in float64, in which differences have more digits."
        )

    def value(lam: Params) -> float:
        try:
            solution = inner_solve(problem, solver, inner_params, lam)
            return outer_value_at(problem, solution.inner_params, lam, step)
        except HypergradError:
            return math.nan

    varies = any(not torch.equal(e[k], estimates[0][k]) for e in estimates for k in e)
    # a direction that leans towards the noise of an estimate must not judge it
    third = max(1, num_estimates // 3) if varies else 0
    leaning, judged = estimates[: third or None], estimates[third:]
    alone = (varies and len(judged) < 2) or (
        num_estimates == 1
        and _is_random(estimator, problem, inner_solver, inner_params, outer_params, step)
    )
    generator = torch.Generator().manual_seed(seed)
    directions = [
        (name, _direction(names, outer_params, leaning, generator))
        for name, names in [(k, [k]) for k, v in outer_params.items() if v.numel()]
        + [(ALL, list(outer_params))] * num_directions
    ]
    middle = value(outer_params)
    noise = noise_level(value, outer_params, directions[-1][1], epsilon)
    differences = [
        directional_derivative(
            value, outer_params, d, middle=middle, epsilon=epsilon, noise=noise, rtol=rtol
        )
        for _, d in directions
    ]
    if alone:
        notes.append(
            f"{type(estimator).__name__} is random, and {num_estimates} of its estimates tell nothing: pass "
            f"num_estimates=16 or more."
        )
    rows = _judge(directions, differences, judged, middle, rtol, alone)
    moved = 0.0
    if "stationary_point" in estimator.requires and any(r.verdict == "wrong" for r in rows):
        moved = _moves_on(problem, solver, inner_params, outer_params)
    diagnosis = _diagnose(rows, rtol, estimator, moved)
    report = HypergradientReport(tuple(rows), diagnosis, rtol, tuple(notes))
    if throw:
        report.raise_if_wrong()
    return report


def _with_seed(estimator: AbstractHypergradientEstimator, i: int) -> AbstractHypergradientEstimator:
    """It, and all estimators in it, with other random numbers: for each ``i`` others."""
    known: Any = estimator
    if i == 0 or not hasattr(known, "__dataclass_fields__"):
        return estimator
    renewed: dict[str, Any] = {}
    for f in fields(known):
        value = getattr(known, f.name)
        if f.name == "seed" and isinstance(value, int):
            renewed["seed"] = value + i * _SEEDS_APART
        elif isinstance(value, AbstractHypergradientEstimator):
            renewed[f.name] = _with_seed(value, i)
    other: AbstractHypergradientEstimator = replace(known, **renewed)
    return other


def _is_random(
    estimator: AbstractHypergradientEstimator,
    problem: BilevelProblem,
    inner_solver: AbstractInnerSolver | None,
    inner_params: Params,
    outer_params: Params,
    step: int,
) -> bool:
    """Whether its first estimate is one of many that it could have been."""
    if isinstance(estimator, TwoPhase):
        due = isinstance(estimator.switch, int) and step >= estimator.switch
        estimator = estimator.second if due else estimator.first
    elif isinstance(estimator, Auto):
        estimator = estimator.choose(problem, inner_solver, inner_params, outer_params).estimator
    elif isinstance(estimator, AbstractDirectionalEstimator):
        return not estimator.is_exact(outer_params)
    else:
        return False
    return _is_random(estimator, problem, inner_solver, inner_params, outer_params, step)


def _direction(
    names: list[str], lam: Params, estimates: list[Params], generator: torch.Generator
) -> Params:
    """Random, leaning towards the estimate, in proportion to each hyperparameter."""
    found = {}
    for k in names:
        v, mean = lam[k].double(), torch.stack([e[k] for e in estimates]).mean(0)
        random = torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.device)
        way = random / random.norm().clamp_min(1e-300)
        if float(mean.norm()) > 0:
            way = way + torch.where((way * mean).sum() < 0, -1.0, 1.0) * mean / mean.norm()
        size = float(v.norm()) or math.sqrt(v.numel())
        found[k] = size * way / way.norm()
    if len(names) == 1 and found[names[0]].dim() == 0:
        found[names[0]].abs_()
    return found


def _judge(
    directions: list[tuple[str, Params]],
    differences: list[tuple[float, float]],
    estimates: list[Params],
    middle: float,
    rtol: float,
    alone: bool,
) -> list[DirectionCheck]:
    products = [
        torch.stack([torch.stack([(e[k] * d[k]).sum() for k in d]).sum() for e in estimates])
        for _, d in directions
    ]
    steepest = max((abs(found) for found, _ in differences if not math.isnan(found)), default=0.0)
    largest = max(steepest, *(float(p.mean().abs()) for p in products))
    rows = []
    for (name, d), (found, uncertainty), product in zip(
        directions, differences, products, strict=True
    ):
        estimate = float(product.mean())
        spread = float(product.std()) / math.sqrt(len(product)) if len(product) > 1 else 0.0
        if alone:
            spread = math.inf
        scale = max(abs(found), abs(estimate), _NEGLIGIBLE * largest) or 1.0
        off, doubt = abs(found - estimate), uncertainty + 3 * spread
        resolved = max(abs(found), 1e-2 * steepest, 1e-8 * abs(middle))
        verdict: Literal["right", "wrong", "unclear"] = "right"
        if math.isnan(found) or uncertainty > _USELESS * resolved:
            verdict = "unclear"
        elif off > rtol * scale + doubt:
            verdict = "wrong"
        elif doubt > _NOISY * scale:
            verdict = "unclear"
        unit = math.sqrt(sum(float(v.norm()) ** 2 for v in d.values()))
        rows.append(
            DirectionCheck(
                name,
                found / unit,
                uncertainty / unit,
                estimate / unit,
                spread / unit,
                off / scale,
                verdict,
            )
        )
    return rows


def _diagnose(
    rows: list[DirectionCheck], rtol: float, estimator: AbstractHypergradientEstimator, moved: float
) -> str:
    """In words; ``moved``: by how much, relatively, another inner solve moves ``w``."""
    wrong = [r for r in rows if r.verdict == "wrong"]
    clear = [r for r in rows if r.verdict != "unclear"]
    unclear = len(rows) - len(clear)
    doubt = f" ({unclear} of {len(rows)} directions are too noisy to tell.)" if unclear else ""
    if not clear:
        return (
            "The finite differences, or the estimates, are too noisy to tell: use float64, an inner_objective without "
            "random numbers, a reference_solver with a tighter tolerance, or a larger num_estimates."
        )
    if not wrong:
        return f"The estimate agrees with finite differences, to within {_percent(rtol)} or their uncertainty.{doubt}"
    said = f"Wrong in {len(wrong)} of {len(rows)} directions.{doubt}"
    ratios = [r.estimate / r.finite_difference if r.finite_difference else math.inf for r in clear]
    middle = sorted(ratios)[len(ratios) // 2]
    alike = all(abs(q - middle) < 0.02 * abs(middle) for q in ratios)
    names = sorted({r.hyperparameter for r in wrong} - {ALL})
    fine = sorted({r.hyperparameter for r in clear} - {ALL} - set(names))
    zero = [r.hyperparameter for r in wrong if r.estimate == 0 and r.hyperparameter in names]
    if len(clear) > 1 and math.isfinite(middle) and alike:
        factor = f"is off by a constant factor of {middle:.3g}"
        cause = f"{'has the wrong sign' if abs(middle + 1) < 0.02 else factor} in all directions."
    elif moved > 0.01 * rtol:
        cause = (
            f"is that of the inner solution, finite differences are those of the iterate, and the inner problem is not "
            f"solved well enough for both to be the same: another inner solve moves w by {_percent(moved)}. Raise "
            f"max_steps or tighten the tolerance, or use Unroll."
        )
    elif names and fine:
        cause = f"is off only for {_listed(names)}, and right for {_listed(fine)}."
    elif _biases(estimator):
        cause = "is off by no constant factor."
    else:
        cause = "is off by no constant factor: a term is missing or has the wrong sign."
    if zero:
        cause += f" It is zero for {_listed(zero)}."
    return f"{said} The estimate {cause}{_biases(estimator)}"


def _biases(estimator: AbstractHypergradientEstimator) -> str:
    """What is known to be a bias among the settings of an estimator."""
    known = []
    truncation, damping = getattr(estimator, "truncation", None), getattr(estimator, "damping", 0.0)
    if truncation is not None:
        known.append(f"truncation={truncation}")
    if damping:
        known.append(f"damping={damping:g}")
    if not isinstance(getattr(estimator, "curvature", Hessian()), Hessian):
        known.append(f"curvature={type(getattr(estimator, 'curvature', None)).__name__}(...)")
    if isinstance(estimator, ZerothOrder) and not estimator.central:
        known.append(f"mu={estimator.mu:g} without central=True")
    if not known:
        return ""
    return (
        f" {' and '.join(known)} of {type(estimator).__name__} is a bias by itself: try it without."
    )


def _moves_on(
    problem: BilevelProblem, solver: AbstractInnerSolver, w0: Params, lam: Params
) -> float:
    """By how much, relatively, a second inner solve moves ``w``."""
    first = inner_solve(problem, solver, w0, lam)
    begun = first.num_steps
    second = inner_solve(
        problem, solver, first.inner_params, lam, start=begun, state=first.state or None
    )
    size = float(_tree.norm(second.inner_params))
    return float(_tree.norm(_tree.sub(second.inner_params, first.inner_params))) / (size or 1.0)


def _cells(row: DirectionCheck) -> tuple[str, str, str, str, str]:
    error = f" ± {row.standard_error:.0e}" if row.standard_error else ""
    return (
        row.hyperparameter,
        f"{row.finite_difference:.6g} ± {row.uncertainty:.0e}",
        f"{row.estimate:.6g}{error}",
        f"{row.relative_error:.1e}",
        row.verdict,
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %"
