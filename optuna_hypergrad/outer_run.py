"""The state of a bilevel run: what an outer step changes, and what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _tree
from ._errors import CorruptTensorError
from ._results import SUCCESS, Result, Status
from ._typing import Params
from .hypergradients import EstimatorState
from .inner import AbstractInnerSolver, inner_solve
from .problem import BilevelProblem
from .search_space import Domain

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class OuterRun:
    """The state of a run: all of it is in ``snapshot()``, and nothing else is needed to go on."""

    def __init__(self) -> None:
        self.step = 0
        self.inner_params: Params = {}
        self.outer_params: Params = {}
        self.state = EstimatorState()
        self.history: list[dict[str, float]] = []
        self.last_norm: dict[str, float] = {}
        self.settings: dict[str, str] = {}
        self.warm_start = False
        self._internal: Params = {}
        self._domains: dict[str, Domain] = {}

    @classmethod
    def start(
        cls,
        inner_params: Params,
        outer_params: Params,
        domains: dict[str, Domain],
        optimizer: OptimizerFactory,
        warm_start: bool,
        lr_lambda: Callable[[int], float] | None = None,
    ) -> OuterRun:
        run = cls()
        run._domains, run.warm_start = domains, warm_start
        run.inner_params = _tree.clone(inner_params)
        run.outer_params = _tree.clone(outer_params)
        run._internal = {
            k: domains[k].to_internal(v.detach()).clone().requires_grad_(True)
            for k, v in outer_params.items()
        }
        run._optimizer = optimizer(list(run._internal.values()))
        run._lr_lambda = lr_lambda
        if lr_lambda is not None:
            if any("lr" not in group for group in run._optimizer.param_groups):
                raise ValueError(
                    f"lr_lambda= multiplies the lr of the outer optimizer, and {run.optimizer_class} has none."
                )
            run._lrs = [float(group["lr"]) for group in run._optimizer.param_groups]
        return run

    _optimizer: torch.optim.Optimizer
    _lr_lambda: Callable[[int], float] | None
    _lrs: list[float]

    @property
    def optimizer_class(self) -> str:
        return type(self._optimizer).__name__

    def next_state(self) -> EstimatorState:
        """What the estimator is given at the next step."""
        return self.state if self.warm_start else self.state.cold()

    def burn_in(
        self, problem: BilevelProblem, inner_solver: AbstractInnerSolver, num_steps: int
    ) -> None:
        head = inner_solve(
            problem, inner_solver, self.inner_params, self.outer_params, num_steps=num_steps
        )
        head.result.raise_if_failed()
        self.inner_params = head.inner_params
        self.state = EstimatorState(head.num_steps, head.state or None)

    def advance(
        self,
        gradient: Params,
        inner_params: Params,
        state: EstimatorState,
    ) -> Result:
        """One outer step along ``gradient`` (external), projected on the bounds; none, if the optimizer
        gives NaN, or infinity where nothing is bounded."""
        held, domains = 0.0, self._domains
        before = _tree.clone(self._internal)
        for k, u in self._internal.items():
            low, high = domains[k].internal_bounds()
            slope = domains[k].internal_gradient(gradient[k], self.outer_params[k])
            u.grad = slope.to(u.dtype)
            blocked = ((u.detach() <= low) & (slope > 0)) | ((u.detach() >= high) & (slope < 0))
            held += float(slope.masked_fill(blocked, 0.0).double().pow(2).sum())
        self._set_lr()
        self._optimizer.step()
        ahead: Params = {}
        with torch.no_grad():
            for k, u in self._internal.items():
                u.grad = None
                u.copy_(_project(u, domains[k]))
                ahead[k] = domains[k].to_external(u.detach().clone())
            for k in ahead:
                if _tree.finite(self._internal[k]) and _tree.finite(ahead[k]):
                    continue
                for name, u in self._internal.items():
                    u.copy_(before[name])
                return Result(
                    Status.NONFINITE,
                    f"Outer step {self.step}: {type(self._optimizer).__name__} moved {k!r} to NaN or "
                    "infinite entries; lower its lr, or give bounds.",
                )
        self.outer_params = ahead
        moved = sum(
            float((u.detach() - before[k]).double().pow(2).sum()) for k, u in self._internal.items()
        )
        self.last_norm = {"hypergradient_norm": math.sqrt(held), "step_length": math.sqrt(moved)}
        self.inner_params, self.state = inner_params, state
        self.step += 1
        return SUCCESS

    def _set_lr(self) -> None:
        if self._lr_lambda is None:
            return
        given: object = self._lr_lambda(self.step)
        try:
            factor = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):  # the last one by tensors
            factor = math.nan
        if not 0.0 <= factor < math.inf:
            raise ValueError(
                f"lr_lambda gives {given!r:.80} at outer step {self.step}; it must be a finite number >= 0."
            )
        for group, lr in zip(self._optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr * factor

    def snapshot(self) -> tuple[Params, dict[str, Any]]:
        tensors: Params = {f"inner/{k}": v for k, v in self.inner_params.items()}
        tensors |= {f"internal/{k}": v.detach() for k, v in self._internal.items()}
        for role, tree in (self.state.solver_state or {}).items():
            tensors |= {f"solver/{role}/{k}": v for k, v in tree.items()}
        tensors |= {f"estimator/{k}": v for k, v in self.state.tensors.items()}
        tensors["rng"] = torch.get_rng_state()
        numbers: dict[str, Any] = {
            "step": self.step,
            "inner_index": self.state.inner_index,
            "solver_roles": {r: list(t) for r, t in (self.state.solver_state or {}).items()},
            "has_solver_state": self.state.solver_state is not None,
            "estimator": self.state.numbers,
            "history": self.history,
            "settings": self.settings,
            "optimizer": {},
        }
        for i, entry in self._optimizer.state_dict()["state"].items():
            plain: dict[str, Any] = {}
            for key, v in entry.items():
                if isinstance(v, Tensor):
                    tensors[f"optimizer/{i}/{key}"] = v
                else:
                    plain[key] = v
            numbers["optimizer"][str(i)] = plain
        return tensors, numbers

    def restore(self, tensors: Params, numbers: dict[str, Any]) -> None:
        """Go on from what :meth:`snapshot` gave.

        Raises:
            CorruptTensorError: if it is no state of this run, because something else has changed it, or
                because the run was another one then.
        """
        try:
            self._restore(tensors, numbers)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            raise CorruptTensorError(
                f"The checkpoint of this trial, of outer step {str(numbers.get('step'))[:20]}, is none of "
                f"this run ({error}). A run is continued with the problem, inner solver and optimizer that "
                "it was begun with: use these, or run it in a new trial."
            ) from error

    def _restore(self, tensors: Params, numbers: dict[str, Any]) -> None:
        step, history, index = numbers["step"], numbers["history"], numbers["inner_index"]
        if any(type(n) is not int or not 0 <= n < 2**63 for n in (step, index)):
            raise ValueError("its steps are no numbers of steps")
        if len(history) != step or not all(map(_is_record, history)):
            raise ValueError("its history is no list of what each step gave")
        inner = {k: _fitting(tensors, f"inner/{k}", v) for k, v in self.inner_params.items()}
        internal = {k: _fitting(tensors, f"internal/{k}", u) for k, u in self._internal.items()}
        some = next(iter(inner.values()))
        solver_state = {
            str(role): {str(k): tensors[f"solver/{role}/{k}"].to(some.device) for k in names}
            for role, names in numbers["solver_roles"].items()
        }
        state_dict = self._optimizer.state_dict()
        state_dict["state"] = {int(i): dict(plain) for i, plain in numbers["optimizer"].items()}
        for key, v in tensors.items():
            if key.startswith("optimizer/"):
                _, i, field_name = key.split("/", 2)
                state_dict["state"][int(i)][field_name] = v
        if not state_dict["state"].keys() <= set(range(len(self._internal))):
            raise ValueError("its optimizer has other hyperparameters")
        self._optimizer.load_state_dict(state_dict)
        torch.set_rng_state(tensors["rng"])
        with torch.no_grad():
            for k, u in self._internal.items():
                u.copy_(internal[k])
                self.outer_params[k] = self._domains[k].to_external(u.detach().clone())
        self.inner_params, self.step, self.history = inner, step, history
        self.state = EstimatorState(
            index,
            solver_state if numbers["has_solver_state"] else None,
            {
                k[len("estimator/") :]: v.to(some.device)
                for k, v in tensors.items()
                if k.startswith("estimator/")
            },
            {str(k): float(v) for k, v in numbers.get("estimator", {}).items()},
        )


def _project(internal: Tensor, domain: Domain) -> Tensor:
    limit = torch.finfo(internal.dtype).max
    low, high = (
        min(max(b, -limit), limit) if math.isfinite(b) else b for b in domain.internal_bounds()
    )
    return internal.detach().clamp(low, high)


def _fitting(tensors: Params, name: str, like: Tensor) -> Tensor:
    found = tensors[name]
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"{name!r} has shape {tuple(found.shape)} and {found.dtype}, not {tuple(like.shape)} and "
            f"{like.dtype}"
        )
    return found.to(like.device)


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or "outer_value" not in record:
        return False
    return all(isinstance(v, float) or abs(v) < 2**63 for v in record.values())
