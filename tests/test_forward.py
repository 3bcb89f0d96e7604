"""Forward differentiation: against reverse and plain autograd, in bounded memory, and what it refuses."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from collections import Counter
from typing import Any

import cases
import problems
import pytest
import test_unrolling as unrolling
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import kept_graph
from optuna_hypergrad.hypergradients._tangents import Pushforward, _OtherwiseError
from optuna_hypergrad.kept_graph import VjpsOfRows
from optuna_hypergrad.operators import InnerGraph

Params = dict[str, Tensor]
PROBLEM, hypers, start = unrolling.PROBLEM, unrolling.hypers, unrolling.start


def only(path: str, patch: pytest.MonkeyPatch) -> None:
    """Take steps in one way, and fail where it is not taken."""

    def otherwise(*_: Any) -> None:
        raise _OtherwiseError

    def fail(*_: Any) -> None:
        raise AssertionError("a step was taken in the other way")

    if path == "whole":
        patch.setattr(Pushforward, "_take", otherwise)
    else:
        patch.setattr(Pushforward, "_take_whole", fail)


@pytest.mark.parametrize("name", unrolling.SOLVERS)
@pytest.mark.parametrize("path", ["algebra", "whole"])
def test_forward_mode_equals_plain_autograd(
    name: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(path, monkeypatch)
    solver, step, settings = unrolling.SOLVERS[name]
    lam = hypers(**settings)
    w, exact = unrolling.by_hand(step, lam)
    found = ohg.hypergradient(
        PROBLEM, start(), lam, estimator=ohg.ForwardMode(), inner_solver=solver
    )
    assert relative_error(found.value, exact) < 1e-10
    assert relative_error(found.inner_params, {k: v.detach() for k, v in w.items()}) < 1e-12


ADAM = ohg.Adam("lr", 9, beta1=0.8, weight_decay="l2", max_norm=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"width": 11},
        {"memory_budget": 80e3},
        {"memory_budget": 80e3, "width": 3},
    ],
)
def test_columns_in_parts_give_the_same_hypergradient(settings: dict[str, Any]) -> None:
    lam = hypers(lr=0.05, l2=0.1)
    exact, found = (
        ohg.hypergradient(PROBLEM, start(), lam, estimator=e, inner_solver=ADAM)
        for e in (ohg.Unroll(), ohg.ForwardMode(**settings))
    )
    assert relative_error(found.value, exact.value) < 1e-10
    assert torch.equal(found.outer_value, exact.outer_value)
    assert (found.stats["num_passes"] > 1) == ("memory_budget" in settings)


def test_warm_starts_and_tolerances_are_those_of_unrolling() -> None:
    solver = ohg.HeavyBall("lr", 300, momentum=0.5, atol=0.03)
    lam = hypers(lr=0.1)
    state, w = None, start()
    for step in range(2):
        lam["log_decay"] = lam["log_decay"] + step
        exact, found = (
            ohg.hypergradient(
                ohg.BilevelProblem(
                    lambda w, lam, _: unrolling.inner(w, lam, unrolling.batch_of(0)),
                    unrolling.outer,
                ),
                w,
                lam,
                estimator=e,
                inner_solver=solver,
                step=step,
                state=state,
            )
            for e in (ohg.Unroll(), ohg.ForwardMode())
        )
        assert 2 < found.stats["num_inner_steps"] < 300
        assert found.stats["num_inner_steps"] == exact.stats["num_inner_steps"]
        assert relative_error(found.value, exact.value) < 1e-10
        assert relative_error(found.inner_params, exact.inner_params) < 1e-14
        assert found.state.inner_index == exact.state.inner_index
        state, w = found.state, found.inner_params


def test_solve_pulls_back_through_the_columns() -> None:
    case = cases.case("quadratic")
    lam = {k: v.clone().requires_grad_() for k, v in case.outer_params.items()}
    w = ohg.solve(
        case.problem.inner_objective,
        case.inner_params,
        lam,
        solver=ohg.GradientDescent(0.25, max_steps=300),
        estimator=ohg.ForwardMode(),
    )
    case.problem.outer_objective(w, lam, None).backward()
    assert relative_error({k: v.grad for k, v in lam.items()}, cases.truth("quadratic")) < 1e-3


def test_two_estimators_alive_at_once_do_not_interact() -> None:
    lam = hypers(lr=0.05, l2=0.1)
    one = ohg.ForwardMode().solve(PROBLEM, ADAM, start(), lam)
    two = ohg.ForwardMode(width=16, memory_budget=80e3).solve(PROBLEM, ADAM, start(), lam)
    slope = {k: problems.randn(*v.shape, seed=i) for i, (k, v) in enumerate(start().items())}
    first, second, again = one.pullback({**slope}), two.pullback({**slope}), one.pullback({**slope})
    assert relative_error(first.outer, second.outer) < 1e-12
    for k in lam:
        assert torch.equal(first.outer[k], again.outer[k])


@dataclasses.dataclass(frozen=True)
class LookAhead(ohg.GradientDescent):
    """Asks for a gradient elsewhere than at ``w``, and looks at a value."""

    name = "look_ahead"

    def step(self, evaluate, inner_params, outer_params, state, index):  # type: ignore[no-untyped-def]
        eta = self.setting("step_size", outer_params, index)
        value, first = evaluate(inner_params)
        second = evaluate({k: v - eta * first[k] for k, v in inner_params.items()})[1]
        factor = 1.0 if float(value.detach()) > 0 else 0.5
        moved = {k: v - eta * factor * second[k] for k, v in inner_params.items()}
        return moved, state, value, first


class NoForward(torch.autograd.Function):
    """The identity, without a formula for forward mode."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        return x.clone()

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        return slope


@dataclasses.dataclass(frozen=True)
class Odd(ohg.GradientDescent):
    name = "odd"

    def step(self, evaluate, inner_params, outer_params, state, index):  # type: ignore[no-untyped-def]
        moved, *rest = super().step(evaluate, inner_params, outer_params, state, index)
        return {k: NoForward.apply(v) for k, v in moved.items()}, *rest


@pytest.mark.parametrize("kind", [LookAhead, Odd])
def test_steps_of_any_kind_are_pushed_through(kind: Any) -> None:
    lam = hypers(lr=0.2)
    exact, found = (
        ohg.hypergradient(PROBLEM, start(), lam, estimator=e, inner_solver=kind("lr", 5))
        for e in (ohg.Unroll(), ohg.ForwardMode())
    )
    assert relative_error(found.value, exact.value) < 1e-10


@pytest.mark.parametrize("kind", [ohg.GradientDescent, LookAhead])
def test_an_inner_objective_without_curvature_is_pushed_through(kind: Any) -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: 10 + w["w"].sum(), lambda w, lam, _: -w["w"].sum()
    )
    found = ohg.hypergradient(
        problem,
        {"w": torch.zeros(2, dtype=F64)},
        {"lr": torch.full((5,), 0.1, dtype=F64)},
        estimator=ohg.ForwardMode(width=3),
        inner_solver=kind("lr", 5),
    )
    assert torch.allclose(found.value["lr"], torch.full((5,), 2.0, dtype=F64))


class Square(torch.autograd.Function):
    """``x^2``, without a rule for ``torch.func.vmap``."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        return Product.apply(2 * ctx.saved_tensors[0], slope)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        a, b = ctx.saved_tensors
        return Product.apply(slope, b), Product.apply(slope, a)


class Branching(Square):
    """``x^2``; its gradient's gradient looks at a value, which no batch has."""

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        return Looking.apply(2 * ctx.saved_tensors[0], slope)


class Looking(Product):
    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        found = Product.backward(ctx, slope)
        return found if float(slope.sum()) > -1e9 else (None, None)


def with_operation(function: Any) -> ohg.BilevelProblem:
    return ohg.BilevelProblem(
        lambda w, lam, _: (function(w["w"] - lam["x"]) * (1 + w["w"] ** 2)).sum(),
        lambda w, lam, _: (w["w"] ** 3).sum(),
    )


def with_three(function: Any, estimator: Any, **settings: Any) -> ohg.HypergradientEstimate:
    return ohg.hypergradient(
        with_operation(function),
        {"w": torch.tensor([0.1, 0.2, 0.3], dtype=F64)},
        {"x": torch.ones(3, dtype=F64)},
        estimator=estimator,
        inner_solver=ohg.GradientDescent(0.1, 4),
        **settings,
    )


def counted_ways(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often rows were tried to be pulled back in each way."""
    tried: Counter[str] = Counter()
    for name in "_by_vmap", "_by_older_batching":

        def way(*args: Any, name: str = name, plain: Any = getattr(kept_graph, name)) -> Any:
            tried[name] += 1
            return plain(*args)

        monkeypatch.setattr(kept_graph, name, way)
    return tried


def test_a_way_to_batch_that_has_failed_is_tried_once_a_solve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = with_three(lambda x: x**2, ohg.Unroll())
    tried = counted_ways(monkeypatch)
    for solves in 1, 2:
        found = with_three(Square.apply, ohg.ForwardMode())
        assert relative_error(found.value, exact.value) < 1e-12
        assert tried == {"_by_vmap": solves, "_by_older_batching": 4 * solves}
    tried.clear()
    with_three(lambda x: x**2, ohg.ForwardMode())
    assert tried == {"_by_vmap": 4}


@pytest.mark.parametrize("function", [Square, Branching])
def test_one_graph_tries_each_way_to_batch_once(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = counted_ways(monkeypatch)
    w, lam = {"w": problems.randn(3, seed=1)}, {"x": torch.ones(3, dtype=F64)}
    inner = with_operation(function.apply).inner_objective
    graph = InnerGraph(inner, w, lam, None)
    rows = torch.eye(3, dtype=F64)
    exact = torch.autograd.functional.hessian(
        lambda v: with_operation(lambda x: x**2).inner_objective({"w": v}, lam, None), w["w"]
    )
    for _ in range(3):
        assert relative_error({"w": graph.hvp_many(rows)}, {"w": exact}) < 1e-12
    assert tried["_by_vmap"] == 1
    assert tried["_by_older_batching"] == (3 if function is Square else 1)


def test_what_has_failed_is_remembered_without_the_graph() -> None:
    vjps = VjpsOfRows()
    x = problems.randn(3, seed=1).requires_grad_()
    y = Branching.apply(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert vjps([slope], [x], [torch.eye(3, dtype=F64)]) is None
    assert "item" in str(vjps.failure)
    alive = weakref.ref(x), weakref.ref(slope)
    del x, y, slope
    gc.collect()
    assert [a() for a in alive] == [None, None]


def test_an_operation_that_cannot_be_batched_costs_a_loop_and_one_warning() -> None:
    with pytest.warns(
        UserWarning, match=r"one by one.*cannot be batched \(.*item.*width=1"
    ) as seen:
        found = with_three(Branching.apply, ohg.ForwardMode())
    assert sum("one by one" in str(w.message) for w in seen) == 1
    exact = with_three(lambda x: x**2, ohg.Unroll())
    assert relative_error(found.value, exact.value) < 1e-12
    quiet = with_three(Branching.apply, ohg.ForwardMode(width=1))
    assert relative_error(quiet.value, exact.value) < 1e-12


def test_an_operation_without_a_second_derivative_is_named() -> None:
    q = problems.randn(1, 1, 3, 8, seed=1)

    def attention(x: Tensor) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            found = torch.nn.functional.scaled_dot_product_attention(q * x[:, None], q, q)
        return found.sum((0, 1, 3))

    for estimator in ohg.ForwardMode(), ohg.Unroll(), ohg.Unroll(recompute="tree"), ohg.Implicit():
        with pytest.raises(
            ohg.RequirementError, match=r"flash_attention.*sdpa_kernel.*or use ZerothOrder"
        ):
            with_three(attention, estimator)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * slope


@pytest.mark.parametrize("of", ["w", "lam"])
def test_a_function_of_their_own_that_is_differentiable_once_is_named(of: str) -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (
            Once.apply(w["w"] if of == "w" else lam["x"]) * (w["w"] - lam["x"])
        ).sum(),
        lambda w, lam, _: w["w"].sum(),
    )
    with pytest.raises(
        ohg.RequirementError, match=r"own autograd functions: Once\).*or use Zeroth"
    ):
        ohg.hypergradient(
            problem,
            {"w": torch.ones(2, dtype=F64)},
            {"x": torch.ones(2, dtype=F64)},
            estimator=ohg.ForwardMode(),
            inner_solver=ohg.GradientDescent(0.1, 2),
        )


def test_single_precision_and_mixed_dtypes_take_the_fast_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only("algebra", monkeypatch)
    x, y = problems.randn(8, 5, seed=1).float(), problems.randn(8, 3, seed=2).float()
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (
            ((unrolling.predict(w, x) - y) ** 2).mean()
            + (lam["decay"].float().exp() * w["w1"] ** 2).sum()
        ),
        lambda w, lam, _: (unrolling.predict(w, x[:3]) ** 2).mean(),
    )
    w = {k: v.float() for k, v in start().items()}
    lam = {"decay": torch.tensor(-3.0, dtype=F64), "lr": torch.tensor(0.05)}
    exact, found = (
        ohg.hypergradient(problem, w, lam, estimator=e, inner_solver=ohg.Adam("lr", 6))
        for e in (ohg.Unroll(), ohg.ForwardMode())
    )
    assert relative_error(found.value, exact.value) < 1e-4
    assert {k: v.dtype for k, v in found.value.items()} == {k: v.dtype for k, v in lam.items()}


def test_data_does_not_count_as_memory_of_a_column() -> None:
    data = torch.zeros(2_000_000, dtype=F64)  # 16 MB
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (
            ((w["w"] - lam["x"]) ** 2).sum() + w["w"].sum() * (w["w"][0] * data).sum()
        ),
        lambda w, lam, _: w["w"].sum(),
    )
    found = ohg.hypergradient(
        problem,
        {"w": torch.zeros(3, dtype=F64)},
        {"x": torch.ones(3, dtype=F64)},
        estimator=ohg.ForwardMode(memory_budget=40e6),
        inner_solver=ohg.GradientDescent(0.1, 1),
    )
    assert torch.allclose(found.value["x"], torch.full((3,), 0.2, dtype=F64))


def test_a_budget_that_holds_nothing_is_refused() -> None:
    with pytest.raises(
        ohg.RequirementError, match=r"one column .* Raise memory_budget to [0-9.e+]+"
    ):
        ohg.hypergradient(
            PROBLEM,
            start(),
            hypers(),
            estimator=ohg.ForwardMode(memory_budget=100),
            inner_solver=ohg.Adam(max_steps=3),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width >= 1"),
        ({"width": 2.5}, r"width >= 1, an integer, or None, got 2\.5"),
        ({"width": True}, "an integer"),
        ({"memory_budget": 0}, "memory_budget > 0 bytes"),
        ({"memory_budget": "1e9"}, "memory_budget > 0 bytes, a number, got '1e9'"),
        ({"memory_budget": math.nan}, "memory_budget > 0 bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ohg.ForwardMode(**settings)


def test_a_hyperparameter_that_no_step_depends_on_is_named() -> None:
    lam = {**hypers(), "unused": torch.ones(2, dtype=F64)}
    with pytest.raises(ohg.ZeroHypergradientError, match=r"'unused' under ForwardMode is zero by"):
        ohg.hypergradient(
            PROBLEM, start(), lam, estimator=ohg.ForwardMode(), inner_solver=ohg.Adam(max_steps=3)
        )


@pytest.mark.parametrize("estimator", [ohg.ForwardMode, ohg.ForwardGradient, ohg.Auto, ohg.Unroll])
def test_a_budget_without_end_is_one(estimator: Any) -> None:
    given = PROBLEM, start(), hypers()
    unlimited, limited = (
        ohg.hypergradient(
            *given, estimator=estimator(memory_budget=b), inner_solver=ohg.HeavyBall(0.1, 3)
        )
        for b in (math.inf, 1e9)
    )
    assert relative_error(unlimited.value, limited.value) < 1e-12


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"estimator": ohg.Unroll},
            r"estimator such as Implicit\(\) or Unroll\(\) as estimator=, not <class",
        ),
        ({"estimator": None}, "as estimator=, not None"),
        ({"inner_solver": torch.optim.SGD}, "as inner_solver=, not <class"),
        ({"inner_solver": ohg.HeavyBall}, "as inner_solver=, not <class"),
    ],
)
def test_what_is_no_method_is_refused(methods: dict[str, Any], message: str) -> None:
    given = {"estimator": ohg.ForwardMode(), "inner_solver": ohg.HeavyBall(0.1, 3), **methods}
    with pytest.raises(ohg.RequirementError, match=f"hypergradient needs an .*{message}"):
        ohg.hypergradient(PROBLEM, start(), hypers(), **given)
    if methods.get("estimator", 0) is not None:
        with pytest.raises(ohg.RequirementError, match=f"minimize_bilevel needs an .*{message}"):
            ohg.minimize_bilevel(PROBLEM, start(), hypers(), num_steps=1, **given)


@pytest.mark.parametrize("estimator", [ohg.ForwardMode, ohg.ForwardGradient])
def test_further_runs_that_end_elsewhere_are_no_silent_error(estimator: Any) -> None:
    def dropped_out(w: Params, lam: Params, batch: Any) -> Tensor:
        kept = torch.nn.functional.dropout(w["w2"], 0.5)
        return unrolling.inner({**w, "w2": kept}, lam, batch)

    problem = ohg.BilevelProblem(dropped_out, unrolling.outer, inner_batch=unrolling.batch_of)
    given = {"inner_solver": ohg.HeavyBall(0.1, 5)}
    ohg.hypergradient(problem, start(), hypers(), estimator=estimator(), **given)
    scarce = estimator(width=1, memory_budget=16_000)
    several = ohg.hypergradient(PROBLEM, start(), hypers(), estimator=scarce, **given)
    assert several.stats["num_passes"] > 1
    with pytest.raises(ohg.RequirementError, match=r"ended elsewhere: .* dropout .* memory_budget"):
        ohg.hypergradient(problem, start(), hypers(), estimator=scarce, **given)


@pytest.mark.parametrize("estimator", [ohg.ForwardMode(), ohg.ForwardGradient(), ohg.Auto()])
@pytest.mark.parametrize(
    ("function", "message"), [(float, "a float"), (lambda v: v * 1j, "a complex number")]
)
def test_what_is_no_real_tensor_is_no_objective(
    estimator: Any, function: Any, message: str
) -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: function(sum(v.detach().sum() for v in w.values())), unrolling.outer
    )
    with pytest.raises(ohg.ObjectiveError, match=f"inner_objective returned {message}"):
        ohg.hypergradient(
            problem, start(), hypers(), estimator=estimator, inner_solver=ohg.HeavyBall(0.1, 3)
        )


@pytest.mark.parametrize(
    "estimator", [ohg.ForwardMode(), ohg.ForwardGradient(2), ohg.Unroll(), ohg.Auto()]
)
def test_a_hyperparameter_without_entries_has_a_hypergradient_without_entries(
    estimator: Any,
) -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: (w["w"] - 1).square().sum() + (lam["none"][:, None] * w["w"]).sum(),
        lambda w, lam, _: w["w"].square().sum(),
    )
    found = ohg.hypergradient(
        problem,
        {"w": torch.zeros(3, dtype=F64)},
        {"none": torch.zeros(0, dtype=F64)},
        estimator=estimator,
        inner_solver=ohg.HeavyBall(0.1, 5),
    )
    assert found.value["none"].shape == (0,)
    assert found.value["none"].dtype == F64
    assert float(found.outer_value) > 0


@pytest.mark.parametrize("estimator", [ohg.ForwardMode(), ohg.ForwardGradient(2)])
def test_an_objective_that_writes_to_its_arguments_is_refused_as_that(estimator: Any) -> None:
    def writing(w: Params, lam: Params, batch: Any) -> Tensor:
        with torch.no_grad():
            w["w1"].clamp_(-0.3, 0.3)
        return unrolling.inner(w, lam, batch)

    problem = ohg.BilevelProblem(writing, unrolling.outer, inner_batch=unrolling.batch_of)
    with pytest.raises(
        ohg.RequirementError,
        match=r"inner_objective writes to a tensor .*clamp\(\.\.\.\) in place of",
    ):
        ohg.hypergradient(
            problem,
            start(),
            hypers(),
            estimator=estimator,
            inner_solver=ohg.GradientDescent(0.1, 3),
        )
