"""Where a bilevel run begins: ``w_0`` of each outer step, and ``lam_0`` within its bounds; refused before any work."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

from . import _tree
from ._errors import HyperparameterError, ProblemError, RequirementError
from ._typing import Params
from .problem import AbstractProblem, check_params, same_batch
from .search_space import Domain


def first_start(
    problem: AbstractProblem,
    inner_params: Params | Callable[[int], Params],
    warm_start: bool,
    num_steps: int,
) -> Params:
    """``w_0`` of outer step 0; refuses warm starts where each step has a start of its own."""
    if warm_start and problem.changes_with_step:
        raise RequirementError(
            f"{type(problem).__name__} has another inner problem at each outer step, and the inner solution of the "
            f"one before is no start for it; pass warm_start=False. (For tasks that stay the same, pass the problem "
            f"of one step: problem.at(0).)"
        )
    if not callable(inner_params):
        return inner_params
    if warm_start:
        raise RequirementError(
            "inner_params is a function of the outer step, and warm starts go on from where the last one ended; "
            "pass warm_start=False, or the tensors of one start."
        )
    first = inner_params(0)
    for step in range(min(num_steps, 1) + 1):  # one without a step before it, and one with
        found = inner_params(step) if step else first
        check_params(found, f"inner_params({step})" if step else "inner_params", ProblemError)
        if not same_batch(found, inner_params(step)):
            raise ProblemError(
                f"inner_params({step}) gave different tensors when called twice. A resumed run must be the same run: draw "
                f"them from the step alone, for example with torch.Generator().manual_seed(step)."
            )
    return first


def start_at(
    inner_params: Params | Callable[[int], Params], step: int, first_params: Params
) -> Params:
    """``w_0`` of an outer step; refuses what is not like that of step 0."""
    if not callable(inner_params):
        return _tree.detach(inner_params)
    found = inner_params(step)
    check_params(found, f"inner_params({step})", ProblemError)
    if found.keys() != first_params.keys():
        raise ProblemError(
            f"inner_params({step}) names {sorted(found)}, and inner_params(0) names {sorted(first_params)}; each outer "
            f"step must start the same inner parameters."
        )
    for name, like in first_params.items():
        v = found[name]
        if (v.shape, v.dtype, v.device) != (like.shape, like.dtype, like.device):
            raise ProblemError(
                f"inner_params({step})[{name!r}] has shape {tuple(v.shape)} and {v.dtype} on {v.device}, and that of "
                f"step 0 has {tuple(like.shape)} and {like.dtype} on {like.device}; make them the same at each outer step."
            )
    return _tree.detach({name: found[name] for name in first_params})


def domains_of(
    outer_params: Params, bounds: Mapping[str, Domain | tuple[float, float]]
) -> dict[str, Domain]:
    for name in bounds:
        if name not in outer_params:
            near = difflib.get_close_matches(name, outer_params, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise HyperparameterError(
                f"bounds names {name!r}, which is not among outer_params ({sorted(outer_params)}).{hint}"
            )
    domains = {}
    for name in outer_params:
        given = bounds.get(name, Domain())
        domain = given if isinstance(given, Domain) else _domain(name, given)
        domain.check(name)
        domains[name] = domain
    return domains


def _domain(name: str, given: tuple[float, float]) -> Domain:
    try:
        low, high = given
        return Domain(float(low), float(high))
    except (TypeError, ValueError):
        raise HyperparameterError(
            f"bounds[{name!r}] is {given!r:.80}; give (low, high), or a Domain."
        ) from None


def check_start(outer_params: Params, domains: dict[str, Domain]) -> None:
    for name, value in outer_params.items():
        domains[name].check_dtype(name, value)
        if not domains[name].contains(value.detach()):
            raise HyperparameterError(
                f"outer_params[{name!r}] starts outside its bounds [{domains[name].low}, {domains[name].high}] "
                f"(min {float(value.min()):.3g}, max {float(value.max()):.3g}); clamp it, or widen the bounds."
            )
