"""Is this hypergradient right? Finite differences with the inner problem solved again, along several directions."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, Literal

import torch

from . import _tree
from ._arguments import check_count, is_number
from ._differences import directional_derivative, noise_level
from ._errors import HypergradError, RequirementError, SolverError
from ._typing import Params
from .check_report import ALL, DirectionCheck, HypergradientReport, diagnose
from .hypergradients import (
    AbstractDirectionalEstimator,
    AbstractHypergradientEstimator,
    Auto,
    PerTask,
    TwoPhase,
    hypergradient,
)
from .hypergradients._outer_gradients import outer_value_at
from .inner import AbstractInnerSolver, inner_solve
from .problem import AbstractProblem, BilevelProblem

_NOISY = 0.1
"""Relative uncertainty from which nothing is concluded from agreement."""
_USELESS = 0.5
"""Relative uncertainty of a finite difference from which nothing is concluded at all."""
_NEGLIGIBLE = 1e-6
"""Of the largest derivative (along directions in proportion to the hyperparameters)."""
_SEEDS_APART = 1_000_003


def check_hypergradient(
    problem: AbstractProblem,
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
        problem: Objectives and batches: a :class:`BilevelProblem`, or :class:`Episodes`.
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
    if getattr(estimator, "returns", "inner") == "penalized":
        raise RequirementError(
            f"check_hypergradient compares with inner solutions, and {type(estimator).__name__}(returns='penalized') gives "
            f"another inner variable; check it with returns='inner': the hypergradient is the same."
        )
    if not estimator.solves:
        raise RequirementError(
            f"check_hypergradient takes one estimate, and {type(estimator).__name__} comes near the hypergradient over many "
            f"steps only, as w and v do: watch residual in the stats of a run, or compare where it ends with a run by "
            f"Implicit()."
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

    now = problem.at(step)

    def value(lam: Params) -> float:
        try:
            solution = inner_solve(now, solver, inner_params, lam)
            return outer_value_at(now, solution.inner_params, lam, step)
        except HypergradError:
            return math.nan

    varies = any(not torch.equal(e[k], estimates[0][k]) for e in estimates for k in e)
    # a direction that leans towards the noise of an estimate must not judge it
    third = max(1, num_estimates // 3) if varies else 0
    leaning, judged = estimates[: third or None], estimates[third:]
    alone = (varies and len(judged) < 2) or (
        num_estimates == 1
        and _is_random(estimator, now, inner_solver, inner_params, outer_params, step)
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
        moved = _moves_on(now, solver, inner_params, outer_params)
    diagnosis = diagnose(rows, rtol, estimator, moved)
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
    elif isinstance(estimator, PerTask):
        estimator = estimator.estimator
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
        random = torch.randn(v.shape, generator=generator, device="cpu", dtype=torch.float64).to(
            v.device
        )
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
