"""What a check of a hypergradient found: its rows, what they say, and how it is printed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ._errors import RequirementError
from .equilibrium import Phantom
from .hypergradients import SAMA, T1T2, AbstractHypergradientEstimator, ZerothOrder
from .operators import Hessian

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


def diagnose(
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
    if isinstance(estimator, T1T2 | SAMA):
        return (
            f" {type(estimator).__name__} puts the step of the inner solver in the place of the inverse Hessian, which is a "
            f"bias by itself: Implicit has none."
        )
    known = []
    if isinstance(solver := getattr(estimator, "solver", None), Phantom):
        known.append(f"solver=Phantom({solver.num_steps}, {solver.relaxation:g})")
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
