"""The ways in: a decorator for objectives, and gradients that were computed elsewhere."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, overload

import optuna
import torch
from optuna.trial import BaseTrial

from .. import _optuna
from .._counting import counting
from .._errors import HypergradError, HyperparameterError, ObjectiveError, SolverError
from .._typing import Params
from ..stores import is_of_storage
from .points import Definition, domain_of
from .sampler import HypergradientSampler
from .trial import DifferentiableTrial, adapted

Objective = Callable[..., Any]


@overload
def differentiable(objective: Objective) -> Callable[..., float]: ...
@overload
def differentiable(
    *, allow_unused: bool = False
) -> Callable[[Objective], Callable[..., float]]: ...


def differentiable(objective: Objective | None = None, *, allow_unused: bool = False) -> Any:
    """Make an objective return the hypergradient along with its value.

    The objective receives a :class:`DifferentiableTrial` and returns a scalar tensor. Called with a
    ``FixedTrial`` or a ``FrozenTrial`` it replays it and returns a float.

    A trial whose loss is NaN or infinite, or in which an inner solve fails (:class:`SolverError`), is a
    failed trial, and the sampler takes the step back; at the very start it is an error. Bad input, and a
    storage that fails, are always errors, and the trial's step will be done again.

    Args:
        objective: ``objective(trial, ...) -> scalar tensor``.
        allow_unused: Take the hypergradient of a hyperparameter that the loss does not depend on for
            zero, rather than for a mistake. For losses that use one in some trials only.
    """
    if objective is None:
        return functools.partial(differentiable, allow_unused=allow_unused)

    @functools.wraps(objective)
    def evaluated(trial: BaseTrial, *args: Any, **kwargs: Any) -> float:
        own = adapted(trial)
        if not isinstance(own, DifferentiableTrial):
            return own.backward(objective(own, *args, **kwargs))
        try:
            try:
                with counting():
                    return own.backward(objective(own, *args, **kwargs), allow_unused=allow_unused)
            except SolverError as error:
                if own.sampler is None:
                    raise
                return own.fail(str(error))
        except optuna.TrialPruned:
            raise
        except Exception as error:
            bad_input = isinstance(error, HypergradError) and not isinstance(error, SolverError)
            if bad_input or is_of_storage(error):
                own.void()
            raise
        except BaseException:  # interrupted
            own.void()
            raise

    return evaluated


def report_hypergradient(trial: BaseTrial, gradients: Mapping[str, Any]) -> None:
    """Give a running trial the gradient of its objective, wherever it was computed.

    Works with an ordinary objective, whose floats (``suggest_float`` without ``step=``) are then moved
    along their gradients from the next trial on, and with a differentiable one, tensors included. May
    be called several times with different names. Nothing happens in a replayed trial, or with a sampler
    that is not a :class:`HypergradientSampler`.

    Args:
        trial: What the objective received, or ``study.ask()`` returned.
        gradients: d(objective)/d(value) by name: a float, a NumPy array or a tensor (or, for a dict of
            tensors, a dict of them).

    Raises:
        HyperparameterError: for a name that was not suggested in this trial, or not as a float without
            a step.
        ObjectiveError: for a gradient of the wrong shape or kind.
    """
    if not isinstance(trial, optuna.Trial):
        return
    sampler = _optuna.find_sampler(trial.study.sampler, HypergradientSampler)
    if sampler is None:
        return
    own = DifferentiableTrial.of(trial)
    leaves, frozen = own._leaves, _optuna.frozen_of(trial)
    floats: dict[str, float] = {}
    tensors: Params = {}
    for name, given in gradients.items():
        if name in leaves.definitions and leaves.definitions[name].kind != "float":
            tensors |= leaves.cast(name, given)
            continue
        if name not in frozen.distributions:
            known = sorted({*frozen.distributions, *leaves.definitions})
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {known[:8]}."
            raise HyperparameterError(
                f"report_hypergradient: {name!r} was not suggested in trial {trial.number}; {hint}"
            )
        if name not in leaves.definitions:
            definition = Definition.of_float(name, domain_of(name, frozen.distributions[name]))
            sampler.declare(trial.study, frozen, definition)
        floats[name] = _number(name, given)
    sampler.receive(trial.study, frozen, floats, tensors)


def _number(name: str, given: Any) -> float:
    try:
        tensor = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ObjectiveError(
            f"The hypergradient of {name!r} is {given!r}, which is not a number."
        ) from None
    if tensor.numel() != 1:
        raise ObjectiveError(
            f"The hypergradient of {name!r} has shape {tuple(tensor.shape)}; it is one number."
        )
    return float(tensor)
