"""What is being solved: two objectives and the batches they see. Data only, no solver, no state."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from . import _tree
from ._errors import HyperparameterError, ProblemError
from ._typing import Batch, Objective, Params


def full_batch(step: int) -> Batch:
    """The batch function of objectives that close over all of their data: always ``None``."""
    return None


class AbstractProblem(abc.ABC):
    """A bilevel problem, or one for each outer step."""

    changes_with_step: ClassVar[bool] = False
    """Whether each outer step has an inner problem of its own, so that warm starts make no sense."""

    @abc.abstractmethod
    def at(self, step: int) -> BilevelProblem:
        """The problem of outer step ``step``."""

    @abc.abstractmethod
    def check(self, inner_params: Params, outer_params: Params, step: int) -> None:
        """Refuse, before any work, what cannot be replayed or does not fit.

        Raises:
            ProblemError: saying what, and what to do.
            HyperparameterError: likewise.
        """


@dataclass(frozen=True)
class BilevelProblem(AbstractProblem):
    """``min over lam of f(w*(lam), lam)`` with ``w*(lam) = argmin over w of g(w, lam)``.

    The objectives are functions: each call is given dicts of its own, in which it may give other tensors to the names (the
    tensors themselves it must not write to). They are called as often as a method needs them, so what they change outside
    (running statistics of batch normalization, for an outer objective in ``eval()`` mode) depends on the method. Keep such
    state out of them.

    Args:
        inner_objective: ``g(inner_params, outer_params, batch) -> scalar tensor``.
        outer_objective: ``f(inner_params, outer_params, batch) -> scalar tensor``.
        inner_batch: ``step -> batch`` of ``g``. It must give equal data for equal steps, so that a
            resumed run is the same run and all products of one solve see one matrix.
        outer_batch: ``step -> batch`` of ``f``, likewise.
    """

    inner_objective: Objective
    outer_objective: Objective
    inner_batch: Callable[[int], Batch] = full_batch
    outer_batch: Callable[[int], Batch] = full_batch

    def at(self, step: int) -> BilevelProblem:
        return self

    def without_start(self) -> BilevelProblem:
        """The problem for methods that differentiate its solution: where an inner solve starts is a constant."""
        return self

    def check(self, inner_params: Params, outer_params: Params, step: int) -> None:
        for label, batch_of in (
            ("inner_batch", self.inner_batch),
            ("outer_batch", self.outer_batch),
        ):
            if batch_of is not full_batch and not same_batch(batch_of(step), batch_of(step)):
                raise ProblemError(
                    f"{label}({step}) gave different data when called twice. A hypergradient replays batches: "
                    f"derive the indices from the step alone, for example with "
                    f"torch.randperm(n, generator=torch.Generator().manual_seed(step))."
                )


def check_problem(
    problem: AbstractProblem, inner_params: Params, outer_params: Params, step: int = 0
) -> None:
    """Refuse, before any work, a problem from which no hypergradient can be taken.

    Raises:
        HyperparameterError: if the outer parameters are not named floating-point tensors.
        ProblemError: if the inner parameters are not, a batch cannot be replayed, or autograd is shut off.
    """
    if torch.is_inference_mode_enabled():
        raise ProblemError(
            "torch.inference_mode() is on, and nothing can be differentiated in it; call this outside of it (under "
            "torch.no_grad() it may be called)."
        )
    check_params(outer_params, "outer_params", HyperparameterError)
    check_params(inner_params, "inner_params", ProblemError)
    problem.check(inner_params, outer_params, step)


def check_params(params: Mapping[str, Tensor], label: str, error: type[Exception]) -> None:
    """Refuse anything but a non-empty dict of finite floating-point tensors on one device.

    Raises:
        error: naming the entry and the remedy.
    """
    if not isinstance(params, Mapping) or not params:
        raise error(f"{label} must be a non-empty dict of tensors, but is {params!r:.80}.")
    for name, value in params.items():
        if not isinstance(name, str):
            raise error(f"{label}: the key {name!r} is not a string.")
        if not isinstance(value, Tensor):
            raise error(
                f"{label}[{name!r}] is a {type(value).__name__}, not a tensor; use torch.tensor(...)."
            )
        if not value.is_floating_point():
            raise error(
                f"{label}[{name!r}] has dtype {value.dtype}, which has no gradient; use a floating-point dtype."
            )
        if value.is_inference():
            raise error(
                f"{label}[{name!r}] was made under torch.inference_mode(), and cannot be differentiated; clone() it "
                f"outside of that."
            )
        if value.numel() and not _tree.finite(value):
            raise error(
                f"{label}[{name!r}] holds NaN or infinite entries; start from finite values."
            )
    devices = {v.device for v in params.values()}
    if len(devices) > 1:
        named = ", ".join(sorted(str(d) for d in devices))
        raise error(f"{label} is spread over several devices ({named}); move it to one.")


def same_batch(a: Any, b: Any) -> bool:
    """Whether two batches hold equal data (tensors, arrays, numbers, strings, containers of them)."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same_batch(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_batch, a, b))
    if is_dataclass(a):
        return all(same_batch(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)
