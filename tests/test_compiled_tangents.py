"""Forward gradients through compiled tangents: the same, and what cannot be compiled is said."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import test_compiled_steps as steps
import torch
from problems import relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import compiled_tangents
from optuna_hypergrad.hypergradients._tangents import Pushforward
from optuna_hypergrad.hypergradients.compiled import in_one_graph, paths_of

Params = dict[str, Tensor]
ADAM, SETTINGS = ohg.Adam("lr", 4, max_norm=0.4, weight_decay="l2"), {"lr": 0.05}
LATE = ohg.GradientDescent(
    lambda lam, step: lam["late"] if step == steps.STEPS - 1 else torch.tensor(0.1), steps.STEPS
)


def estimate(estimator: Any, solver: Any, lam: Params, problem: Any = steps.PROBLEM) -> Params:
    where = problem, steps.start(), lam
    return ohg.hypergradient(*where, estimator=estimator, inner_solver=solver).value


def test_all_directions_give_the_exact_hypergradient() -> None:
    """15 directions, in three products of 5."""
    lam = steps.hypers(**SETTINGS)
    found = estimate(ohg.ForwardGradient(None, width=5, compile=True), ADAM, lam)
    assert relative_error(found, estimate(ohg.Unroll(), ADAM, lam)) < 1e-9


def test_what_cannot_be_compiled_is_refused() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, w: Params, lam: Params, batch: Any) -> Tensor:
            return steps.inner(w, lam, batch)

    def branches(w: Params, lam: Params, batch: Any) -> Tensor:
        loss = steps.inner(w, lam, batch)
        return loss if float(loss.detach()) > 0 else 2 * loss

    solver, compiled = steps.BALL, ohg.ForwardGradient(2, compile=True)
    with pytest.raises(ValueError, match="compile True or False, got 'yes'"):
        ohg.ForwardGradient(compile="yes")  # type: ignore[arg-type]
    for objective, message in ((Unhashable(), "must be hashable"), (branches, "could not turn")):
        problem = ohg.BilevelProblem(objective, steps.outer, steps.batch_of)
        with pytest.raises(ohg.RequirementError, match=f"{message}.*compile=False"):
            estimate(compiled, solver, steps.hypers(), problem)
    with pytest.raises(ohg.RequirementError, match=r"Lookahead is not made.*compile=False"):
        estimate(compiled, ohg.Lookahead(ohg.GradientDescent(0.1, 4)), steps.hypers())


def test_blocks_of_columns_that_meet_other_random_numbers_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would be pushed through another function."""

    def loss(w: Params, lam: Params, batch: Any) -> Tensor:
        return steps.inner({**w, "w": torch.nn.functional.dropout(w["w"])}, lam, batch)

    monkeypatch.setattr(compiled_tangents, "compiled_whole", lambda function: function)
    estimator = ohg.ForwardGradient(6, width=2, compile=True)
    problem = ohg.BilevelProblem(loss, steps.outer, steps.batch_of)
    with pytest.raises(ohg.RequirementError, match=r"3 blocks.*not the same.*compile=False"):
        estimate(estimator, steps.BALL, steps.hypers(), problem)
    estimate(replace(estimator, width=6), steps.BALL, steps.hypers(), problem)


@pytest.mark.parametrize(("solver", "looks"), [(steps.BALL, 1), (LATE, steps.STEPS)])
def test_steps_that_are_alike_are_looked_at_once(
    solver: Any, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a hyperparameter that no inner step sees; a schedule may come to see one in its last step."""
    looked, look = [], Pushforward._look
    monkeypatch.setattr(compiled_tangents, "compiled_whole", lambda function: function)
    monkeypatch.setattr(Pushforward, "_look", lambda *where: looked.append(look(*where)))
    lam = steps.hypers(late=0.1)

    def outer(w: Params, lam: Params, batch: Any) -> Tensor:
        return steps.outer(w, lam, batch) + 0 * lam["late"] + 0 * lam["l2"]

    def inner(
        w: Params, lam: Params, batch: Any
    ) -> Tensor:  # anew: compiled functions are kept by it
        return steps.inner(w, lam, batch)

    problem = ohg.BilevelProblem(inner, outer, steps.batch_of)
    found = estimate(ohg.ForwardGradient(None, compile=True), solver, lam, problem)
    assert relative_error(found, estimate(ohg.Unroll(), solver, lam, problem)) < 1e-9
    assert len(looked) == looks


def test_after_a_refusal_all_is_as_before() -> None:
    """The compiler gives up on checkpoints within torch.func; Unroll measures its tapes by hooks on saved tensors."""

    def loss(w: Params, lam: Params, batch: Any) -> Tensor:
        part = torch.utils.checkpoint.checkpoint(torch.sin, w["w"], use_reentrant=False)
        return steps.inner(w, lam, batch) + part.square().sum()

    problem = ohg.BilevelProblem(loss, steps.outer, steps.batch_of)
    solver = steps.BALL
    with pytest.raises(ohg.RequirementError, match="could not turn"):
        estimate(ohg.ForwardGradient(2, compile=True), solver, steps.hypers(), problem)
    found = estimate(ohg.ForwardGradient(None), solver, steps.hypers(), problem)
    assert relative_error(found, estimate(ohg.Unroll(), solver, steps.hypers(), problem)) < 1e-9


def test_implicit_refuses_an_objective_that_cannot_be_kept_before_it_is_called() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, w: Params, lam: Params, batch: Any) -> Tensor:
            raise AssertionError("called")

    problem = ohg.BilevelProblem(Unhashable(), steps.outer)
    implicit = ohg.Implicit(ohg.Neumann(3, alpha=0.1), compile=True)
    with pytest.raises(ohg.RequirementError, match=r"must be hashable.*Implicit\(compile=False\)"):
        estimate(implicit, ohg.GradientDescent(0.1, 3), {"a": torch.ones(2)}, problem)


def test_objectives_are_not_kept_for_ever() -> None:
    """A study that makes them anew in every trial would hold on to the data of them all."""
    held = []
    for _ in range(20):
        data = torch.ones(3)
        held.append(weakref.ref(data))

        def loss(w: Params, lam: Params, batch: Any, data: Tensor = data) -> Tensor:
            return (w["w"] * lam["a"] * data).square().sum()

        at = {"w": torch.ones(3)}, {"a": torch.ones(3)}
        assert paths_of("Unroll", loss, *at, None) == {"a"}
    del data, loss
    gc.collect()
    assert sum(r() is not None for r in held) <= 16


def test_an_error_that_says_nothing_is_one_of_the_compiler_as_well() -> None:
    with (
        pytest.raises(ohg.RequirementError, match=r"turn it into one graph \(AssertionError: \)"),
        in_one_graph("Unroll", "it"),
    ):
        raise AssertionError


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize(
    "estimator",
    [
        ohg.ForwardGradient(2, compile=True),
        ohg.Unroll(compile=True),
        ohg.Implicit(ohg.Neumann(3, alpha=0.1), compile=True),
    ],
)
def test_functions_that_the_compiler_gets_wrong_are_refused(estimator: Any) -> None:
    """torch 2.13 leaves part of their second derivatives out, and says nothing: hypergradients would be off by half."""

    def loss(w: Params, lam: Params, batch: Any) -> Tensor:
        return steps.inner(w, lam, batch) + Sine.apply(w["w"]).square().sum()

    problem = ohg.BilevelProblem(loss, steps.outer, steps.batch_of)
    with pytest.raises(ohg.RequirementError, match=r"\(Sine\).*compile=False"):
        estimate(estimator, ohg.GradientDescent(0.1, 3), steps.hypers(), problem)


def test_convolutions_are_batched() -> None:
    """No operation of a usual network is taken row by row: it would be as many products as there are directions."""
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))

    def loss(w: Params, lam: Params, batch: object) -> Tensor:
        hidden = torch.nn.functional.conv2d(x * lam["scale"], w["kernel"], padding=1)
        hidden = torch.nn.functional.batch_norm(hidden, None, None, training=True).relu()
        hidden = torch.nn.functional.max_pool2d(torch.nn.functional.avg_pool2d(hidden, 2), 2)
        return torch.nn.functional.cross_entropy(hidden.flatten(1) @ w["last"], torch.arange(4))

    w = {"kernel": 0.3 * torch.ones(3, 2, 3, 3), "last": torch.linspace(-1, 1, 48).view(12, 4)}
    problem = ohg.BilevelProblem(loss, loss)

    def operations(num_directions: int) -> int:
        estimator = ohg.ForwardGradient(num_directions, width=num_directions)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            ohg.hypergradient(
                problem,
                w,
                {"scale": torch.ones(2, 8, 8)},
                estimator=estimator,
                inner_solver=ohg.GradientDescent(0.1, 2),
            )
        return sum(e.count for e in seen.key_averages() if "conv" in e.key)

    assert operations(32) == operations(4)
