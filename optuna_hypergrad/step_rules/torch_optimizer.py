"""Any ``torch.optim`` optimizer as a step rule: projected, and taken back where it diverges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._tree import all_finite, clone
from .._typing import Params
from ..search_space import Domain
from ._abstract import AbstractStepRule, Bounds, Proposal, StepState
from ._trees import free, largest, pack, project, unpack, usable

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class TorchOptimizer(AbstractStepRule):
    """The steps of a ``torch.optim`` optimizer in internal coordinates, projected on the bounds.

    Momentum and noise need steps to somewhat worse values, so these stand. Taken back to the best
    point, with a fresh optimizer and all later steps halved, are evaluations without a finite value
    and gradient, and values above the first one by more than the whole progress so far and five
    times the usual change from one value to the next. A step that overflows ends at the bounds, and is
    followed by a fresh optimizer and halved steps too.

    Args:
        factory: ``factory(tensors)`` gives the optimizer, e.g.
            ``functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)``. Not ``LBFGS``.
        patience: Evaluations without a better value that end the trajectory.
        gtol: Projected gradient, relative to the first one, that ends it.
    """

    name: ClassVar[str] = "torch"

    factory: OptimizerFactory = torch.optim.Adam
    patience: int = 30
    gtol: float = 1e-7

    def init(self, point: Params, lower: Bounds, upper: Bounds) -> StepState:
        """State before the first evaluation.

        Raises:
            ValueError: for an optimizer that evaluates its loss itself.
        """
        optimizer = self.factory([v.detach().clone().requires_grad_(True) for v in point.values()])
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "torch.optim.LBFGS evaluates the loss several times per step, and an outer step "
                "has one evaluation; use optimizer='lbfgs' instead."
            )
        return StepState({}, {"fraction": 1.0})

    def step(
        self,
        state: StepState,
        point: Params,
        value: float,
        gradient: Params,
        lower: Bounds,
        upper: Bounds,
    ) -> Proposal:
        n = dict(state.numbers)
        best, slope = unpack("best", state.tensors), unpack("gradient", state.tensors)
        moments = unpack("optimizer", state.tensors)
        good = usable(value, point, gradient)
        if not good and not best:
            reason = "The first evaluation had no finite value and gradient: start elsewhere."
            return Proposal(point, state, reason)
        n["since_best"] = int(n.get("since_best", 0)) + 1
        if good and not (best and _diverged(n, value)):
            if not best or value < float(n["best"]):
                best, slope = clone(point), clone(gradient)
                n["best"], n["since_best"] = value, 0
            n["kept"] = int(n.get("kept", -1)) + 1
            n["variation"] = float(n.get("variation", 0.0)) + abs(
                value - float(n.get("last", value))
            )
            n["last"] = value
            n.setdefault("first", value)
        else:
            point, gradient, moments = best, slope, {}
            n.pop("settings", None)
            n["fraction"] = 0.5 * float(n["fraction"])

        leaves = {k: v.detach().clone().requires_grad_(True) for k, v in point.items()}
        optimizer = self.factory(list(leaves.values()))
        if "settings" in n:
            optimizer.load_state_dict(_join(moments, json.loads(str(n["settings"])), optimizer))
        for k, leaf in leaves.items():
            leaf.grad = gradient[k].detach().to(leaf).clone()
        optimizer.step()
        moments, settings = _split(optimizer.state_dict())
        n["settings"] = json.dumps(settings)
        if not all_finite({**leaves, **moments}):
            moments, n["fraction"] = {}, 0.5 * float(n["fraction"])
            n.pop("settings")
        fraction = float(n["fraction"])
        ahead = {
            k: x.detach() * (1.0 - fraction) + _within(leaves[k], x, lower[k], upper[k]) * fraction
            for k, x in point.items()
        }
        tensors = {**pack("best", best), **pack("gradient", slope), **pack("optimizer", moments)}
        stop = self._stop(n, point, gradient, lower, upper)
        return Proposal(project(ahead, lower, upper), StepState(tensors, n), stop)

    def _stop(
        self,
        n: dict[str, float | int | bool | str],
        point: Params,
        gradient: Params,
        lower: Bounds,
        upper: Bounds,
    ) -> str | None:
        moving = free(point, gradient, lower, upper)
        size = largest({k: g * moving[k] for k, g in gradient.items()})
        if size <= self.gtol * float(n.setdefault("first_size", size)):
            return f"The projected gradient is {size:.2g}, {self.gtol:g} of the first."
        if float(n["fraction"]) < 1e-6:
            return "Steps were taken back until nothing was left of them."
        if int(n["since_best"]) >= self.patience:
            return f"No better value in {self.patience} evaluations."
        return None


def _within(leaf: Tensor, before: Tensor, lower: float, upper: float) -> Tensor:
    """Where an optimizer has moved ``before``; to its bounds, if any, where that is not finite."""
    moved = leaf.detach()
    stopped = Domain(lower, upper).clamp(moved)
    stopped = stopped.where(torch.isfinite(stopped), before.detach())
    return moved.where(torch.isfinite(moved), stopped)


def _diverged(n: dict[str, float | int | bool | str], value: float) -> bool:
    first, usual = float(n["first"]), float(n["variation"]) / max(int(n["kept"]), 1)
    return usual > 0.0 and value - first > (first - float(n["best"])) + 5.0 * usual


def _split(state_dict: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
    """Tensors of an optimizer's state apart from the numbers, which JSON holds."""
    tensors: Params = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        plain[str(index)] = {}
        for key, entry in entries.items():
            if isinstance(entry, Tensor):
                tensors[f"{index}/{key}"] = entry.detach()
            else:
                plain[str(index)][key] = entry
    return tensors, plain


def _join(
    tensors: Params, plain: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The ``state_dict`` that :func:`_split` took apart, with the settings of ``optimizer``."""
    state: dict[int, dict[str, Any]] = {int(i): dict(e) for i, e in plain.items()}
    for key, tensor in tensors.items():
        index, _, entry = key.partition("/")
        state.setdefault(int(index), {})[entry] = tensor.clone()
    return {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
