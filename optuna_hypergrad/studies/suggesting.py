"""The ``suggest_*`` methods of a differentiable trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from optuna.trial import BaseTrial
from torch import Tensor, nn

from .. import _optuna
from .._errors import HyperparameterError
from .._typing import Params
from .leaves import (
    Leaves,
    Shape,
    checked_domain,
    checked_init,
    module_start,
    tensor_definition,
    tensor_start,
    tree_start,
)
from .points import Definition, flatten

_LEAVES = "_hypergrad_leaves"


class Suggesting:
    """The ``suggest_*`` methods, over any of Optuna's trials."""

    @property
    def _leaves(self) -> Leaves:
        leaves = self.__dict__.get(_LEAVES)
        if leaves is None:
            leaves = self.__dict__[_LEAVES] = Leaves()
        return cast(Leaves, leaves)

    def suggest_float(
        self,
        name: str,
        low: float,
        high: float,
        *,
        step: float | None = None,
        log: bool = False,
        init: float | None = None,
    ) -> Any:
        """A number: a 0-d float64 tensor that requires grad; a plain float where ``step`` is given.

        Args:
            name: Its name in ``trial.params``, where it is a float within the bounds.
            low: Lower bound, included.
            high: Upper bound, included.
            step: Makes it discrete: it has no hypergradient then and goes to the base sampler.
            log: Move in the logarithm.
            init: Where the first trajectory starts; the (geometric) middle of the range by default.

        Raises:
            HyperparameterError: for bounds or an ``init`` that cannot be used, or another definition of
                a known name.
        """
        if step is not None:
            if init is not None:
                raise HyperparameterError(
                    f"Hyperparameter {name!r}: step= leaves it to the base sampler, which takes no init=; "
                    "use study.enqueue_trial."
                )
            return self._plain_float(name, low, high, step=step, log=log)
        domain = checked_domain(name, low, high, log)
        if not (math.isfinite(domain.low) and math.isfinite(domain.high)):
            raise HyperparameterError(
                f"Hyperparameter {name!r}: Optuna's parameters need finite bounds, and [{low}, {high}] is "
                "not; give bounds, or use suggest_tensor(name, (), ...), which takes infinite ones."
            )
        definition = Definition.of_float(name, domain)
        if init is not None:
            checked_init(name, domain, init)
        leaves = self._leaves
        if not leaves.check(definition):
            self._declare(definition, init)
            value = float(self._plain_float(name, domain.low, domain.high, log=domain.log))
            leaves.add(definition, {name: torch.tensor(value, dtype=torch.float64, device="cpu")})
        return leaves.of(name)

    def suggest_tensor(
        self,
        name: str,
        shape: Shape,
        low: float,
        high: float,
        *,
        log: bool = False,
        init: float | Tensor | np.ndarray | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A tensor of hyperparameters that requires grad. It is kept in the study's tensor store.

        Args:
            name: As for :meth:`suggest_float`; not shared with a parameter of another kind.
            shape: Of the tensor. It may differ between settings of the discrete hyperparameters, not
                within one.
            low: Lower bound of every entry, included; ``-inf`` for none.
            high: Upper bound of every entry, included; ``inf`` for none.
            log: Move in the logarithm.
            init: Start of the first trajectory: a number for all entries, or a tensor of ``shape``.
            dtype: Floating point; that of ``init`` or torch's default one where not given.
            device: Of the tensor.

        Raises:
            HyperparameterError: naming the hyperparameter and the remedy.
            StorageError: if the study's storage cannot hold tensors.
        """
        domain = checked_domain(name, low, high, log)
        start = tensor_start(name, domain, shape, init, dtype, device)
        return cast(Tensor, self._suggest_start(tensor_definition(name, domain, start), start))

    def suggest_tensor_like(
        self,
        name: str,
        params: Mapping[str, Tensor],
        low: float | Mapping[str, float],
        high: float | Mapping[str, float],
        *,
        log: bool = False,
        init: float | Mapping[str, Tensor] | None = None,
    ) -> Params:
        """A tensor of hyperparameters for each of ``params``: a weight decay per weight, say.

        Args:
            name: Of the whole dict.
            params: Gives keys, shapes, dtypes and devices; ``dict(model.named_parameters())``.
            low: Lower bound of all entries, or a dict with one for each of ``params``.
            high: Upper bound, likewise.
            log: Move in the logarithm.
            init: Start: one number, or a dict like ``params``.

        Raises:
            HyperparameterError: naming the hyperparameter and the remedy.
            StorageError: if the study's storage cannot hold tensors.
        """
        if isinstance(low, Mapping) or isinstance(high, Mapping):
            checked_domain(name, -math.inf, math.inf, False)
        else:
            checked_domain(name, low, high, log)
        definition, start = tree_start(name, low, high, log, params, init)
        return cast(Params, self._suggest_start(definition, start))

    def suggest_module(self, name: str, module: nn.Module) -> Params:
        """Every weight of ``module`` as a hyperparameter, unbounded, starting at what it is.

        A natural step of a weight tensor is the root mean square of its initial entries. Use the
        result with ``torch.func.functional_call(module, result, args)``.

        Raises:
            HyperparameterError: if ``module`` has no weights, or some that are not finite.
            StorageError: if the study's storage cannot hold tensors.
        """
        checked_domain(name, -math.inf, math.inf, False)
        definition, start = module_start(name, module)
        return cast(Params, self._suggest_start(definition, start))

    def _suggest_start(self, definition: Definition, start: Tensor | Params) -> Tensor | Params:
        leaves = self._leaves
        if not leaves.check(definition):
            leaves.add(definition, self._tensor_values(definition, flatten(definition, start)))
        return leaves.of(definition.name)

    def _plain_float(self, name: str, low: float, high: float, **options: Any) -> float:
        return float(super().suggest_float(name, low, high, **options))  # type: ignore[misc]

    def _declare(self, definition: Definition, init: Any) -> None:
        """Nobody to tell, when a trial is replayed."""

    def _tensor_values(self, definition: Definition, start: Params) -> Params:
        """Values out of the parameters that are replayed."""
        given = _optuna.replayed(cast(BaseTrial, self), definition.name)
        if given is None:
            raise HyperparameterError(
                f"Hyperparameter {definition.name!r} is a {definition.kind}, and the trial to replay has no "
                "value of it. Use optuna.trial.FixedTrial({**best_trial.params, **load_tensors(study)})."
            )
        values = {}
        for flat, value in flatten(definition, given).items():
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
            like = start.get(flat)
            if like is None or tensor.shape != like.shape:
                raise HyperparameterError(
                    f"Hyperparameter {flat!r}: the value to replay has shape {tuple(tensor.shape)}, not "
                    f"{None if like is None else tuple(like.shape)}."
                )
            values[flat] = tensor.detach().to(like)
        return values

    def backward(self, loss: Any, *, allow_unused: bool = False) -> float:
        """The loss as a float. (In a study, its hypergradient is recorded as well.)"""
        return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
