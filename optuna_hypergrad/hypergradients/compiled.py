"""The linear solve of implicit differentiation as one compiled function.

Small problems pay for overhead, large ones for memory traffic: ``torch.compile`` removes both when it
sees the whole loop of products at once. The primal pass is traced once and shared by all products; what
no product needs of it, such as the inner gradient itself, is not computed. On a CPU the calls of the generated
code, some 30 in each product, are made from C++ as well: made from Python they take 2 to 3 % of the CPU time of large
products and a third of that of small ones, since all threads but one wait for them. (torch logs a warning where it has
to call a function such as ``torch.linalg.solve`` through Python after all.)
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _tree
from .._errors import RequirementError
from .._twice import own_functions
from .._typing import Batch, Objective, Params
from ..ihvp import AbstractLinearSolver, LinearSolution
from ..ihvp._base import scale_of
from ..operators import DampedOperator, Flattener, HessianOperator, InnerGraph

_CACHE_SIZE = 16
_MOST_PATHS = 256
_CALLS_IN_CPP = torch.__version__ >= "2.13"
"""Older releases have the setting as well; it has not been tried with them, and they call from Python."""

_ISOLATED: dict[str, Any] = (
    {"isolate_recompiles": True}  # torch 2.6 has one limit for all functions of the same code
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _compiled(
    inner_objective: Objective, solver: AbstractLinearSolver, damping: float, device: str
) -> Callable[..., tuple[Tensor, Tensor, Params]]:
    def run(
        w: Params, lam: Params, batch: Batch, b: list[Tensor], alpha: Tensor
    ) -> tuple[Tensor, Tensor, Params]:
        names = list(w)
        _, pull = torch.func.vjp(  # type: ignore[misc]
            lambda w, lam: torch.func.grad(inner_objective)(w, lam, batch), w, lam
        )

        def product(vector: list[Tensor]) -> list[Tensor]:
            found = pull(dict(zip(names, vector, strict=True)))[0]
            if not damping:
                return [found[k] for k in names]
            return [found[k] + damping * v for k, v in zip(names, vector, strict=True)]

        found = solver.traced(product, b, alpha)
        cross = pull({k: -x for k, x in zip(names, found.x, strict=True)})[1]
        return found.residual, found.least_curvature, cross

    return compiled_whole(run, cpp_wrapper=_CALLS_IN_CPP and device == "cpu")


def check_compilable(label: str, inner_objective: Objective) -> None:
    """Refuse an objective by which compiled functions cannot be kept.

    Raises:
        RequirementError: naming ``label``.
    """
    if not isinstance(inner_objective, Hashable):
        raise RequirementError(
            f"{label}(compile=True) keeps what it compiles by inner_objective, which must be hashable: define a "
            f"function, or give its class a __hash__ (a dataclass: eq=False). Or use {label}(compile=False)."
        )


def check_traced(label: str, value: Tensor) -> None:
    """Refuse a ``value`` of the inner objective whose second derivatives the compiler would get wrong, without a word.

    Raises:
        RequirementError: naming ``label``.
    """
    found = own_functions(value)
    if found:
        raise RequirementError(
            f"{label}(compile=True): inner_objective uses a torch.autograd.Function of its own ({', '.join(found)}), and "
            f"torch.compile leaves part of its second derivative out. Use {label}(compile=False), or write it with "
            f"operations of torch."
        )


@contextmanager
def in_one_graph(label: str, what: str) -> Iterator[None]:
    """Around a call that may compile ``what``.

    Raises:
        RequirementError: naming ``label``, where the compiler fails.
    """
    hooks: Any = torch._C._autograd
    enabled = hooks._saved_tensors_hooks_is_enabled()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise RequirementError(
            f"torch.compile could not turn {what} into one graph ({type(error).__name__}: {said:.200}). "
            f"Use {label}(compile=False), or take data-dependent branches, prints and "
            f"third-party calls out of the inner objective, and give batches of one shape, with tensors in place of numbers "
            f"that change from step to step."
        ) from error
    finally:
        # A compiler that gives up, or is stopped, within torch.func leaves them off, for the whole process.
        if enabled:
            hooks._saved_tensors_hooks_enable()


def compiled_whole(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    """``function`` as one graph, anew for other shapes; other functions do not count toward torch's limit on that.

    Args:
        more: Options of the compiler.
    """
    from .matrix_products import MatrixProducts  # takes a second: the compiler comes with it

    options: dict[str, Any] = {"post_grad_custom_post_pass": MatrixProducts(), **more}
    compiled: Callable[..., Any] = torch.compile(
        function, fullgraph=True, dynamic=False, options=options, **_ISOLATED
    )
    return compiled


_Paths = dict[tuple[Hashable, ...], frozenset[str]]


@functools.lru_cache(maxsize=_CACHE_SIZE)
def _paths(inner_objective: Objective) -> _Paths:
    """By names and batch; with the data that an objective holds, it is kept no longer than what is compiled of it."""
    return {}


def kind_of(batch: Batch) -> Hashable:
    """What a compiled function is compiled anew for: the structure, numbers, and shapes of the tensors."""
    leaves, structure = torch.utils._pytree.tree_flatten(batch)
    kinds = (
        (tuple(v.shape), v.dtype)
        if isinstance(v, Tensor)
        else (type(v), v if isinstance(v, Hashable) else None)
        for v in leaves
    )
    return (str(structure), *kinds)


def compiled_solve(
    solver: AbstractLinearSolver,
    damping: float,
    b: Tensor,
    inner_objective: Objective,
    inner_params: Params,
    outer_params: Params,
    batch: Batch,
) -> tuple[LinearSolution, dict[str, Tensor | None]]:
    """Solve ``(H + damping I) x = b`` and pull back, in one compiled call.

    The first call compiles (tens of seconds). Compiled functions are kept by ``inner_objective``:
    define it once, not anew in every trial.

    Returns:
        The solution without its ``x``, which the compiled code uses up; ``-M^T x`` by hyperparameter,
        ``None`` where the inner gradient ignores it.

    Raises:
        RequirementError: if ``torch.compile`` cannot trace the inner objective as one graph.
    """
    w, lam, scale = _tree.detach(inner_params), _tree.detach(outer_params), scale_of(b)
    label, known, key = "Implicit", _paths(inner_objective), (tuple(lam), kind_of(batch))
    alpha, curvature, probes = solver.fixed_alpha(), math.nan, 0
    if key not in known or alpha is None:
        graph = InnerGraph(inner_objective, w, lam, batch)
        if key not in known:
            _remember(label, known, key, graph)
        if alpha is None:
            operator = DampedOperator(HessianOperator(graph), damping)
            alpha, curvature, failure = solver.step_length(operator, b)
            probes = operator.num_products
            if failure is not None:
                nothing = LinearSolution(torch.zeros_like(b), math.nan, probes, failure, curvature)
                return nothing, {k: None for k in lam}
        del graph
    run = _compiled(inner_objective, solver, damping, b.device.type)
    with in_one_graph(label, f"the inner objective and {solver.name}"), torch.no_grad():
        parts = Flattener(w).split(b if scale == 1.0 else b / scale)
        start = torch.tensor(alpha, dtype=b.dtype, device="cpu")
        residual, least_curvature, cross = run(w, lam, batch, parts, start)
    solution = LinearSolution(
        b.new_empty(0),
        float(residual),
        solver.num_traced_products() + probes,
        curvature=curvature,
    )
    verdict = solver.traced_verdict(solution, float(least_curvature))
    if scale != 1.0:
        cross = {k: v * scale for k, v in cross.items()}
    reached = {k: v if k in known[key] else None for k, v in cross.items()}
    return replace(solution, result=verdict), reached


def paths_of(
    label: str, inner_objective: Objective, inner_params: Params, outer_params: Params, batch: Batch
) -> frozenset[str]:
    """The hyperparameters that the inner gradient depends on at all: a trace gives zeros for the rest.

    Raises:
        RequirementError: if the inner objective cannot be differentiated twice, or not when it is compiled (naming
            ``label``).
    """
    known, key = _paths(inner_objective), (tuple(outer_params), kind_of(batch))
    if key not in known:
        _remember(label, known, key, InnerGraph(inner_objective, inner_params, outer_params, batch))
    return known[key]


def _remember(label: str, paths: _Paths, key: tuple[Hashable, ...], graph: InnerGraph) -> None:
    with torch.enable_grad():
        check_traced(
            label,
            graph.inner_objective(dict(graph.inner_params), dict(graph.outer_params), graph.batch),
        )
    cross = graph.cross_vjp(
        graph.layout.flatten([torch.ones_like(w) for w in graph.inner_params.values()])
    )
    if len(paths) >= _MOST_PATHS:
        paths.pop(next(iter(paths)))
    paths[key] = frozenset(k for k, v in cross.items() if v is not None)
