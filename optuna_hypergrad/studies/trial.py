"""Trials whose continuous hyperparameters are tensors that require grad."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import optuna
import torch
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial
from torch import Tensor

from .. import _optuna
from .._counting import current_count
from .._errors import HyperparameterError, ObjectiveError, RequirementError
from .._typing import Params
from ..stores import TensorStore
from .leaves import Leaves
from .plan import Plan
from .points import Definition
from .sampler import HypergradientSampler
from .suggesting import Suggesting


class DifferentiableTrial(Suggesting, optuna.Trial):
    """An ``optuna.Trial`` that also suggests tensors, and whose floats are tensors that require grad.

    ``@differentiable`` gives one to the objective. With the ask-and-tell interface::

        trial = DifferentiableTrial.of(study.ask())
        x = trial.suggest_float("x", 0.0, 1.0)
        study.tell(trial, trial.backward((x - 0.3) ** 2))

    With a sampler that is not a :class:`HypergradientSampler`, ``suggest_float`` gives tensors all the
    same, and the gradient is not used; tensors cannot be suggested.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("Use DifferentiableTrial.of(trial).")

    @classmethod
    def of(cls, trial: optuna.Trial) -> DifferentiableTrial:
        """The same trial: what either of them does, the other has done."""
        if isinstance(trial, cls):
            return trial
        if not isinstance(trial, optuna.Trial):
            raise TypeError(
                f"DifferentiableTrial.of takes an optuna.Trial, not {type(trial).__name__}."
            )
        if _optuna.is_multi_objective(trial.study):
            raise RequirementError(
                f"The study has {len(trial.study.directions)} objectives, and hypergradients follow one. "
                "Return one value (a weighted sum, say) in a single-objective study."
            )
        self = cls.__new__(cls)
        self.__dict__ = trial.__dict__
        return self

    @property
    def sampler(self) -> HypergradientSampler | None:
        """The study's sampler, also where another one is wrapped around it."""
        return cast(
            "HypergradientSampler | None",
            _optuna.find_sampler(self.study.sampler, HypergradientSampler),
        )

    @property
    def tensor_store(self) -> TensorStore:
        """Where tensors of this trial go: the sampler's ``tensor_store``, or the study's default."""
        sampler = self.sampler
        if sampler is not None:
            return sampler.store_of(self.study)
        return TensorStore.of_study(self.study)

    def commit(self, values: Mapping[str, Tensor | Mapping[str, Tensor]]) -> None:
        """Final values of tensors that were tuned inside the trial, as by ``minimize_bilevel``.

        The trial is then complete in itself: no hypergradient is expected, and no step follows.

        Raises:
            HyperparameterError: for a name that is no suggested tensor, or a value that does not fit.
        """
        sampler, leaves = self.sampler, self._leaves
        final: Params = {}
        for name, value in values.items():
            definition = leaves.definitions.get(name)
            if definition is None or definition.kind == "float":
                raise HyperparameterError(
                    f"commit: {name!r} is no tensor that was suggested in this trial."
                )
            for flat, tensor in leaves.cast(name, value).items():
                key = flat[len(name) + 1 :] if definition.kind == "tree" else ""
                if not definition.domains[key].contains(tensor):
                    raise HyperparameterError(
                        f"commit: {flat!r} is outside its bounds or not finite; clamp it."
                    )
                final[flat] = tensor
        if sampler is not None:
            plan = self._plan(sampler)
            plan.started |= final
            plan.committed = True

    def backward(self, loss: Any, *, allow_unused: bool = False) -> float:
        """Take the hypergradient of a scalar ``loss`` and record it. Returns the loss as a float.

        Args:
            loss: A tensor with one entry; or a number, where the gradient was reported by
                :func:`report_hypergradient`, the trial was committed, or nothing continuous suggested.
            allow_unused: Take the hypergradient of what the loss does not depend on for zero.

        Returns:
            NaN, with a warning, where the loss is not finite and the sampler can step back.

        Raises:
            ObjectiveError: if no hypergradient can be taken: no path, not scalar, changed in place,
                not finite at the very start.
            ZeroHypergradientError: if the loss does not depend on one of the hyperparameters.
        """
        leaves = self._leaves
        leaves.check_untouched()
        sampler = self.sampler
        plan = None if sampler is None else self._plan(sampler)
        done = plan is not None and (plan.committed or plan.reported)
        if not isinstance(loss, Tensor):
            value = _as_number(loss, list(leaves.definitions))
            if leaves.tensors and not done and sampler is not None:
                raise ObjectiveError(
                    f"The objective returned {type(loss).__name__} and not a tensor, so "
                    f"{_names(leaves)} would get no hypergradient. Return the loss tensor itself (without "
                    ".item() or float()), or call report_hypergradient(trial, {...}) before returning."
                )
            if math.isfinite(value) or sampler is None or not leaves.tensors:
                return value
            return self.fail(f"The loss is {value}")
        if loss.numel() != 1:
            raise ObjectiveError(
                f"The objective returned a tensor of shape {tuple(loss.shape)}; return one number, such as "
                "loss.mean()."
            )
        value = float(loss.detach())
        if not leaves.tensors or sampler is None:
            return value
        if done:
            return value if math.isfinite(value) else self.fail(f"The loss is {value}")
        if not loss.requires_grad:
            raise ObjectiveError(
                f"The objective returned a tensor with no path to {_names(leaves)}. Use the suggested "
                "tensors as they are (no .item(), .detach() or torch.no_grad()), and train through "
                "ohg.solve or an unrolled loop."
            )
        if not math.isfinite(value):
            return self.fail(f"The loss is {value}")
        gradient = leaves.gradient(loss, allow_unused)
        bad = [n for n, g in gradient.items() if not bool(torch.isfinite(g).all())]
        if bad:
            _optuna.logger.warning(
                f"Trial {self.number}: the hypergradient of {bad[0]!r} is not finite; the step is taken back."
            )
        self._send(gradient)
        return value

    def fail(self, reason: str) -> float:
        """NaN for Optuna, which marks the trial as failed, so that the sampler steps back.

        Raises:
            ObjectiveError: if there is nothing to step back to.
        """
        sampler = self.sampler
        plan = None if sampler is None else self._plan(sampler)
        where = self._where()
        if sampler is not None and plan is not None and sampler.is_first(self.study, plan):
            raise ObjectiveError(
                f"{reason} at the start of trial {self.number} ({where}). Start elsewhere with init= or "
                "study.enqueue_trial, or narrow the bounds."
            )
        _optuna.logger.warning(
            f"Trial {self.number} failed. {reason} ({where}); the step is taken back."
        )
        return math.nan

    def void(self) -> None:
        """Say that nothing was evaluated: the trial's step will be done again as if for the first time."""
        sampler = self.sampler
        plan = None if sampler is None else sampler.plan_of(self.study, _optuna.trial_id_of(self))
        if plan is not None:
            plan.void = True

    def _where(self) -> str:
        shown = [f"{n}={v!r}" for n, v in _optuna.frozen_of(self).params.items()]
        shown += [d.name for d in self._leaves.definitions.values() if d.kind != "float"]
        return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")

    def _send(self, gradient: Params) -> None:
        sampler = self.sampler
        if sampler is None:
            return
        definitions = self._leaves.definitions
        floats = {n: float(g) for n, g in gradient.items() if _kind(definitions, n) == "float"}
        tensors = {n: g for n, g in gradient.items() if n not in floats}
        self._plan(sampler).count = current_count()
        sampler.receive(self.study, _optuna.frozen_of(self), floats, tensors)

    def _plan(self, sampler: HypergradientSampler) -> Plan:
        return sampler.plan_for(self.study, _optuna.frozen_of(self))

    def _declare(self, definition: Definition, init: Any) -> None:
        sampler = self.sampler
        if sampler is not None:
            _ = self.relative_params  # plans the trial, once
            sampler.declare(self.study, _optuna.frozen_of(self), definition, init)

    def _tensor_values(self, definition: Definition, start: Params) -> Params:
        sampler = self.sampler
        if sampler is None:
            raise HyperparameterError(
                f"Hyperparameter {definition.name!r} is a {definition.kind}, which "
                f"{type(self.study.sampler).__name__} cannot suggest; use "
                "create_study(sampler=HypergradientSampler())."
            )
        _ = self.tensor_store  # raises where tensors cannot be stored
        _ = self.relative_params
        return sampler.declare(self.study, _optuna.frozen_of(self), definition, start)


class _FixedReplay(Suggesting, FixedTrial):
    """A ``FixedTrial`` for a differentiable objective."""


class _FrozenReplay(Suggesting, FrozenTrial):
    """A ``FrozenTrial`` for a differentiable objective."""


def adapted(trial: BaseTrial) -> DifferentiableTrial | _FixedReplay | _FrozenReplay:
    """Any of Optuna's trials, as one that a differentiable objective can take."""
    if isinstance(trial, optuna.Trial):
        return DifferentiableTrial.of(trial)
    if isinstance(trial, (_FixedReplay, _FrozenReplay)):
        return trial
    replay: _FixedReplay | _FrozenReplay
    if isinstance(trial, FixedTrial):
        replay = _FixedReplay.__new__(_FixedReplay)
    elif isinstance(trial, FrozenTrial):
        replay = _FrozenReplay.__new__(_FrozenReplay)
    else:
        raise TypeError(f"A differentiable objective takes a trial, not {type(trial).__name__}.")
    replay.__dict__ = {**trial.__dict__}
    return replay


def _kind(definitions: Mapping[str, Definition], flat: str) -> str:
    definition = definitions.get(flat)
    return "tree" if definition is None else definition.kind


def _names(leaves: Leaves) -> str:
    names = [repr(n) for n in leaves.definitions]
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def _as_number(loss: Any, names: list[str]) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError):
        raise ObjectiveError(
            f"The objective returned {type(loss).__name__}, which is not one number; return the loss as a "
            "scalar tensor."
        ) from None
