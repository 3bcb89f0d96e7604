"""Tasks that share outer variables: each outer step averages over a batch of them (meta-learning)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from . import _tree
from ._arguments import check_count
from ._errors import (
    HypergradError,
    HyperparameterError,
    ObjectiveError,
    ProblemError,
    RequirementError,
)
from ._typing import Batch, Objective, Params
from .gauss_newton import GaussNewton
from .problem import AbstractProblem, BilevelProblem, same_batch
from .proximal import Proximal, check_shared

_NO_VMAP = re.compile("vmap|functorch|batching rule", re.IGNORECASE)
"""Of what torch says where an operation cannot be vectorized."""

Task = tuple[Batch, Batch]
"""What the inner objective of a task sees, and what its outer objective sees (support, query)."""


@dataclass(frozen=True)
class Episodes(AbstractProblem):
    """``min over lam of mean over tasks i of f(w_i*(lam), lam; query_i)``, ``w_i* = argmin over w of g(w, lam; support_i)``.

    At each outer step there is another batch of ``B`` tasks, each with an inner problem of its own, solved from the
    start: pass ``warm_start=False`` to :func:`minimize_bilevel`. The inner parameters of all tasks are one dict of
    tensors with a leading dimension of ``B`` (:meth:`start` makes it), so that every estimator and solver can be used;
    :class:`PerTask` takes the tasks one by one instead.

    With ``origin="theta."`` each task starts from the shared ``outer_params["theta." + name]``, and its inner variable
    is the *displacement* from there, zero at first: ``w_i = theta + inner_params[i]``. So methods that differentiate
    steps see the start: ``Unroll`` gives the gradient of MAML. ``Implicit`` sees only what the solution depends on, the
    proximal term of :func:`proximal`, and gives that of iMAML: ``(I + H / strength)^-1`` times the gradient of the outer
    objective, with ``H`` the Hessian of the task's loss. (Damping of ``Implicit`` is added to that, and is a bias.)

    References: Finn, Abbeel & Levine (2017), "Model-agnostic meta-learning" (MAML); Rajeswaran, Finn, Kakade &
    Levine (2019), "Meta-learning with implicit gradients" (iMAML), equations 3-6; Franceschi, Frasconi, Salzo, Grazzi
    & Pontil (2018), "Bilevel programming for hyperparameter optimization and meta-learning", for shared features.

    Args:
        inner_objective: ``g(w, outer_params, support) -> scalar tensor`` of one task.
        outer_objective: ``f(w, outer_params, query) -> scalar tensor`` of one task.
        tasks: ``step -> [(support, query), ...]``, ``B`` tasks of any form, equal for equal steps.
        origin: Prefix of the outer parameters that all tasks start from; ``None`` if they start from the inner
            parameters that are given.
        vectorize: Evaluate the tasks in one go by ``torch.func.vmap``: faster where tensors are small. Supports,
            and queries, are then tensors (or dicts, lists, tuples of them) of equal shapes. Not for closed forms, fixed points and
            whatever else looks at values: those are refused.
    """

    changes_with_step: ClassVar[bool] = True

    inner_objective: Objective
    outer_objective: Objective
    tasks: Callable[[int], Sequence[Task]]
    origin: str | None = None
    vectorize: bool = False
    _origin_counts: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        for label in ("inner_objective", "outer_objective", "tasks"):
            if not callable(getattr(self, label)):
                raise ProblemError(
                    f"Episodes needs a function as {label}, got {getattr(self, label)!r:.80}."
                )
        if not (self.origin is None or isinstance(self.origin, str)):
            raise ProblemError(
                f'Episodes needs a prefix of outer parameters as origin ("theta."), or None, got {self.origin!r:.80}.'
            )

    def at(self, step: int) -> EpisodeBatch:
        """The problem of the tasks of outer step ``step``.

        Raises:
            ProblemError: if there are none, or they are no pairs, or cannot be evaluated in one go.
        """
        return self._batch_of(self._tasks_of(step))

    def _batch_of(self, tasks: Sequence[Task]) -> EpisodeBatch:
        supports, queries = [s for s, _ in tasks], [q for _, q in tasks]
        if self.vectorize:
            supports, queries = _stack(supports, "supports"), _stack(queries, "queries")
        inner_of_all = self.over_tasks(self.inner_objective)
        outer_of_all = self.over_tasks(self.outer_objective)
        count = len(tasks)

        def inner_objective(w: Params, lam: Params, batches: Batch) -> Tensor:
            _check_number(w, count)
            return _one_of_each(inner_of_all(w, lam, batches), count, "inner_objective").sum()

        def outer_objective(w: Params, lam: Params, batches: Batch) -> Tensor:
            _check_number(w, count)
            return _one_of_each(outer_of_all(w, lam, batches), count, "outer_objective").mean()

        return EpisodeBatch(
            inner_objective,
            outer_objective,
            _always(supports),
            _always(queries),
            episodes=self,
            tasks=tuple(tasks),
        )

    def over_tasks(self, function: Objective) -> Objective:
        """A function of one task, lifted to the inner parameters and batches of all of them.

        It turns ``(w, outer_params, batch) -> tensor`` into ``(inner_params, outer_params, batches) -> tensor`` with a
        leading dimension of ``B``, for example for the ``outputs`` of :class:`GaussNewton`.
        """
        function = self.of_displacement(function)
        return _in_one_go(function) if self.vectorize else _one_by_one(function)

    def of_displacement(self, function: Objective) -> Objective:
        """A function of one task's parameters as one of its inner variable; the same without an ``origin``."""
        if self.origin is None:
            return function
        origin, counts = self.origin, self._origin_counts

        def moved(inner_params: Params, outer_params: Params, batch: Batch) -> Tensor:
            theta = outer_params if counts else _tree.detach(outer_params)
            return function(_shifted(inner_params, theta, origin), outer_params, batch)

        return moved

    def gauss_newton(
        self,
        outputs: Callable[[Params, Params, Batch], Tensor],
        loss: Callable[[Tensor, Params, Batch], Tensor],
    ) -> GaussNewton:
        """The Gauss-Newton curvature of all tasks, for ``Implicit(curvature=...)``: positive definite with a pull.

        The Hessian of a network may be indefinite where its task is not solved, and then CG refuses it. The pull of
        :func:`proximal` is taken from the inner objective.

        Args:
            outputs: ``(w, outer_params, support) -> tensor``, the model of one task, of equal shapes for all.
            loss: ``(outputs, outer_params, support) -> scalar tensor``, convex in the outputs, of one task; with the
                pull it is the inner objective.
        """

        def loss_of_all(found: Tensor, outer_params: Params, batches: Batch) -> Tensor:
            if self.vectorize:
                with _saying_what_has_no_vmap():
                    total: Tensor = torch.func.vmap(lambda o, b: loss(o, outer_params, b))(
                        found, batches
                    ).sum()
                return total
            parts = zip(found.unbind(), batches, strict=True)
            return torch.stack([loss(o, outer_params, b) for o, b in parts]).sum()

        pull = None
        if isinstance(self.inner_objective, Proximal):
            pull_of_all = self.over_tasks(self.inner_objective.pull)

            def pull(inner_params: Params, outer_params: Params, batches: Batch) -> Tensor:
                return pull_of_all(inner_params, outer_params, batches).sum()

        return GaussNewton(self.over_tasks(outputs), loss_of_all, pull)

    def start(self, params: Params, num_tasks: int | None = None) -> Params:
        """Where the inner solves begin.

        Args:
            params: With an ``origin``, the outer parameters; otherwise the first inner parameters of one task.
            num_tasks: ``B``; as many as ``tasks(0)`` has by default.

        Returns:
            Zeros for each outer parameter under ``origin``, or ``params``, once for each task: ``(B, *shape)``.

        Raises:
            HyperparameterError: if no outer parameter is under ``origin``.
        """
        check_count("Episodes.start", "num_tasks", num_tasks, 1, none=True)
        count = len(self._tasks_of(0)) if num_tasks is None else num_tasks
        if self.origin is None:
            return {k: v.detach().expand(count, *v.shape).clone() for k, v in params.items()}
        size = len(self.origin)
        shared = {k[size:]: v for k, v in params.items() if k.startswith(self.origin)}
        if not shared:
            raise HyperparameterError(
                f"Episodes(origin={self.origin!r}): none of {sorted(params)} begins with {self.origin!r}; name what all "
                f"tasks start from so, for example {self.origin + 'w'!r} for the inner parameter 'w'."
            )
        return {k: v.detach().new_zeros(count, *v.shape) for k, v in shared.items()}

    def adapted(self, inner_params: Params, outer_params: Params) -> Params:
        """``w_i`` of each task, ``(B, *shape)``: with an ``origin``, ``theta`` plus the displacements."""
        if self.origin is None:
            return dict(inner_params)
        return _shifted(inner_params, outer_params, self.origin)

    def check(self, inner_params: Params, outer_params: Params, step: int) -> None:
        if not same_batch(self._tasks_of(step), self._tasks_of(step)):
            raise ProblemError(
                f"Episodes: tasks({step}) gave different tasks when called twice. A hypergradient replays them: draw "
                f"them from the step alone, for example with torch.Generator().manual_seed(step)."
            )
        _check_number(inner_params, len(self._tasks_of(step)))
        if self.origin is not None:
            for k, v in inner_params.items():
                check_shared(outer_params, self.origin, k, v.shape[1:], "Episodes(origin=")

    def _tasks_of(self, step: int) -> list[Task]:
        tasks = list(self.tasks(step))
        if not tasks:
            raise ProblemError(
                f"Episodes: tasks({step}) is empty; an outer step averages over one task at least."
            )
        for i, task in enumerate(tasks):
            if not (isinstance(task, (tuple, list)) and len(task) == 2):
                raise ProblemError(
                    f"Episodes: task {i} of step {step} is {task!r:.80}; give a pair (support, query)."
                )
        return [(support, query) for support, query in tasks]


@dataclass(frozen=True)
class EpisodeBatch(BilevelProblem):
    """The tasks of one outer step as one problem: the sum of their inner and the mean of their outer objectives.

    Its batches are those of all tasks: a list, or stacked if ``vectorize`` is set.

    Args:
        episodes: What it was made from.
        tasks: The supports and queries.
    """

    episodes: Episodes = field(kw_only=True)
    tasks: tuple[Task, ...] = field(kw_only=True)

    def each(self) -> list[EpisodeBatch]:
        """Each task by itself: inner parameters with a leading dimension of 1."""
        return [self.episodes._batch_of((task,)) for task in self.tasks]

    def without_start(self) -> BilevelProblem:
        if self.episodes.origin is None:
            return self
        return replace(self.episodes, _origin_counts=False)._batch_of(self.tasks)

    def check(self, inner_params: Params, outer_params: Params, step: int) -> None:
        """Refuse inner parameters of another number of tasks than there are.

        Raises:
            ProblemError: naming both.
        """
        _check_number(inner_params, len(self.tasks))


def _check_number(inner_params: Params, count: int) -> None:
    for k, v in inner_params.items():
        if v.dim() == 0 or len(v) != count:
            raise ProblemError(
                f"inner_params[{k!r}] has shape {tuple(v.shape)}, and there are {count} tasks; its first dimension must "
                f"be that of the tasks, as Episodes.start(...) gives it, and each outer step must have as many."
            )


def _one_of_each(values: Tensor, count: int, label: str) -> Tensor:
    """``(B,)``, or ``(B, 1)``, as ``(B,)``."""
    if values.numel() != count:
        raise ObjectiveError(
            f"{label} returned a tensor of shape {tuple(values.shape[1:])} for a task; reduce it to a scalar, e.g. by "
            f".mean()."
        )
    return values.reshape(count)


def _shifted(inner_params: Params, outer_params: Params, origin: str) -> Params:
    return {k: outer_params[origin + k] + v for k, v in inner_params.items()}


def _always(batch: Batch) -> Callable[[int], Batch]:
    return lambda step: batch


def _one_by_one(function: Objective) -> Objective:
    def of_all(inner_params: Params, outer_params: Params, batches: list[Batch]) -> Tensor:
        parts = {k: v.unbind() for k, v in inner_params.items()}
        return torch.stack(
            [
                function({k: v[i] for k, v in parts.items()}, dict(outer_params), batch)
                for i, batch in enumerate(batches)
            ]
        )

    return of_all


def _in_one_go(function: Objective) -> Objective:
    def of_all(inner_params: Params, outer_params: Params, batches: Batch) -> Tensor:
        def of_one(w: Params, batch: Batch) -> Tensor:
            return function(w, outer_params, batch)

        with _saying_what_has_no_vmap():
            found: Tensor = torch.func.vmap(of_one, randomness="different")(inner_params, batches)
        return found

    return of_all


@contextlib.contextmanager
def _saying_what_has_no_vmap() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, HypergradError) or not _NO_VMAP.search(str(error)):
            raise
        said = str(error).strip().partition("\n")[0].partition(". ")[0][:200].rstrip(".")
        raise RequirementError(
            f"Episodes(vectorize=True) evaluates all tasks in one go by torch.func.vmap, and one of the operations of a "
            f"task does not allow that ({said}), as closed forms, fixed points and whatever looks at values do not. Pass "
            f"vectorize=False, which takes the tasks one by one."
        ) from error


def _stack(batches: list[Batch], label: str) -> Batch:
    """Batches of one form as one, with a leading dimension."""
    first = batches[0]
    if isinstance(first, Tensor) and all(isinstance(b, Tensor) for b in batches):
        shapes = sorted({tuple(b.shape) for b in batches})
        if len(shapes) > 1:
            raise ProblemError(
                f"Episodes(vectorize=True): the {label} have different shapes, {shapes[0]} and {shapes[1]}; make them "
                f"equal, or pass vectorize=False."
            )
        return torch.stack(batches)
    if isinstance(first, dict) and all(
        isinstance(b, dict) and b.keys() == first.keys() for b in batches
    ):
        return {k: _stack([b[k] for b in batches], label) for k in first}
    if isinstance(first, (tuple, list)) and all(
        isinstance(b, (tuple, list)) and len(b) == len(first) for b in batches
    ):
        return tuple(_stack(list(parts), label) for parts in zip(*batches, strict=True))
    raise ProblemError(
        f"Episodes(vectorize=True): the {label} must be tensors, or dicts, lists or tuples of them, all of one form, "
        f"and there is {first!r:.60}; pass vectorize=False."
    )
