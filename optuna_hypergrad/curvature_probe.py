"""A probe of how the inner objective curves, before anything is differentiated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _tree
from ._arguments import check_count
from ._errors import RequirementError, SolverError
from ._results import Result, Status
from ._typing import Params
from .curvature import lanczos
from .curvature_report import CurvatureReport
from .operators import (
    AbstractCurvature,
    AbstractLinearOperator,
    AveragedOperator,
    Hessian,
    InnerGraph,
)
from .problem import BilevelProblem, check_problem, full_batch

_VARIANCE_VECTORS = 4


def probe_curvature(
    of: BilevelProblem | AbstractLinearOperator,
    inner_params: Params | None = None,
    outer_params: Params | None = None,
    *,
    curvature: AbstractCurvature | None = None,
    num_products: int = 20,
    num_probes: int = 1,
    num_batches: int = 1,
    batch_size: int | None = None,
    start: int = 0,
    seed: int = 0,
) -> CurvatureReport:
    """How the inner objective curves at a point, and the step sizes and damping that follow: ``print`` it.

    Extreme eigenvalues by Lanczos; the density of all by stochastic Lanczos quadrature; from several batches, by
    how much the Hessians of batches differ, and so what happens to the largest eigenvalue, and to step sizes, at
    other batch sizes. Cost: ``num_products * num_probes`` products for each of ``num_batches`` batches, and four
    more for each if there are several. Memory: the graphs of all these batches, and ``num_products`` vectors.

    Args:
        of: A problem, whose inner objective is probed; or a symmetric operator.
        inner_params: ``w``, where a problem is probed: the place at which steps are to be taken, or the inner solution.
        outer_params: ``lam``, likewise.
        curvature: The matrix that stands for the Hessian; ``None`` for the Hessian itself.
        num_products: Lanczos steps, 10 to 20 as a rule.
        num_probes: Random start vectors; more make the density, the trace and the negative part more exact.
        num_batches: The mean over inner batches ``start``, ``start + 1``, ... is probed.
        batch_size: Samples in one inner batch; without it nothing is said about other batch sizes.
        start: Index of the first inner batch.
        seed: Of the start vectors.

    Raises:
        RequirementError: if there is nothing to probe, or a batch is asked for that does not exist.
        SolverError: if products are not finite.

    References: Granziol, Zohren & Roberts (2022), "Learning rates as a function of batch size: a random matrix
    theory approach to neural network training"; quadrature: Golub & Meurant (2010); Ubaru, Chen & Saad (2017).
    """
    who = "probe_curvature"
    check_count(who, "num_products", num_products, 2)
    check_count(who, "num_probes", num_probes, 1)
    check_count(who, "num_batches", num_batches, 1)
    check_count(who, "batch_size", batch_size, 1, none=True)
    check_count(who, "start", start, 0)
    check_count(who, "seed", seed, 0)
    operators = _operators(of, inner_params, outer_params, curvature, start, num_batches)
    operator = operators[0] if num_batches == 1 else AveragedOperator(operators)
    if not operator.symmetric:
        raise RequirementError(f"{who} needs a symmetric operator, and this one is not.")
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    generator = torch.Generator().manual_seed(seed)
    runs = []
    for _ in range(num_probes):
        runs.append(lanczos(operator, _normal(operator.size, generator).to(like), num_products))
        if not bool(torch.isfinite(runs[-1].values).all()):
            message = (
                "probe_curvature: products with the inner Hessian hold NaN or infinite entries; probe where the inner "
                "objective is finite and twice differentiable."
            )
            raise SolverError(message, Result(Status.NONFINITE, message))
    variance = math.nan
    if num_batches > 1:
        assert isinstance(operator, AveragedOperator)
        variance = _variance(operator, like, generator) * (batch_size or 1)
    top = max(runs, key=lambda r: float(r.values[-1]))
    least = min(runs, key=lambda r: float(r.values[0]))
    rounding = _rounding(operators[0])
    least_bound = rounding * max(abs(float(top.values[-1])), abs(float(least.values[0])))
    return CurvatureReport(
        size=operator.size,
        largest=float(top.values[-1]),
        largest_bound=max(float(top.bounds[-1]), least_bound),
        smallest=float(least.values[0]),
        smallest_bound=max(float(least.bounds[0]), least_bound),
        rounding=rounding,
        nodes=torch.cat([r.values for r in runs]),
        weights=torch.cat([r.weights for r in runs]) / num_probes,
        num_products=sum(o.num_products for o in operators),
        num_batches=num_batches,
        batch_size=batch_size,
        hessian_variance=variance,
    )


def _operators(
    of: object,
    inner_params: Params | None,
    outer_params: Params | None,
    curvature: AbstractCurvature | None,
    start: int,
    num_batches: int,
) -> list[AbstractLinearOperator]:
    """One for each batch."""
    if isinstance(of, AbstractLinearOperator):
        given = inner_params is not None or outer_params is not None or curvature is not None
        if given or num_batches > 1:
            raise RequirementError(
                "probe_curvature: an operator is what it is; inner_params, outer_params, curvature and num_batches go "
                "with a BilevelProblem."
            )
        return [of]
    if not isinstance(of, BilevelProblem):
        raise RequirementError(
            f"probe_curvature needs a BilevelProblem or an operator, not {of!r:.80}."
        )
    if inner_params is None or outer_params is None:
        raise RequirementError(
            "probe_curvature needs inner_params and outer_params: curvature is that at a point."
        )
    check_problem(of, inner_params, outer_params)
    if num_batches > 1 and of.inner_batch is full_batch:
        raise RequirementError(
            f"probe_curvature(num_batches={num_batches}): this problem has no inner_batch, so that its objective sees "
            f"all data at once; there is one batch."
        )
    matrix = Hessian() if curvature is None else curvature
    if not isinstance(matrix, AbstractCurvature):
        raise RequirementError(
            f"probe_curvature: curvature must be Hessian() or GaussNewton(...), not {matrix!r:.80}."
        )
    w, lam = _tree.detach(inner_params), _tree.detach(outer_params)
    batches = [of.inner_batch(start + i) for i in range(num_batches)]
    return [matrix.build(InnerGraph(of.inner_objective, w, lam, b), b) for b in batches]


def _variance(operator: AveragedOperator, like: Tensor, generator: torch.Generator) -> float:
    """Of an entry of a batch's Hessian: ``E |(H_i - H) v|^2 / P`` for ``|v| = 1``."""
    count, total = len(operator.operators), 0.0
    for _ in range(_VARIANCE_VECTORS):
        v = _normal(operator.size, generator).to(like)
        each = operator.each(v / torch.linalg.vector_norm(v))
        total += float((each - each.mean(0)).double().square().sum()) / (count - 1)
    return total / _VARIANCE_VECTORS / operator.size


def _rounding(operator: AbstractLinearOperator) -> float:
    """Relative, of a product: that of the parameters' dtype, in which it is made."""
    graph = getattr(operator, "graph", None)
    dtypes = graph.layout.dtypes if isinstance(graph, InnerGraph) else [operator.dtype]
    return max(float(torch.finfo(d).eps) for d in dtypes)


def _normal(size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device="cpu", dtype=torch.float32)
