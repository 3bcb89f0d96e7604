"""``ohg.evaluate``: a black box in an objective."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from problems import F64, relative_error
from torch import Tensor

import optuna_hypergrad as ohg

Params = dict[str, Tensor]


class Counted:
    """A black box in NumPy that knows how often it was called."""

    def __init__(self, broken_after: int | None = None) -> None:
        self.asked: list[Params] = []
        self.broken_after = broken_after

    def __call__(self, lam: Params) -> float:
        self.asked.append(lam)
        if self.broken_after is not None and len(self.asked) > self.broken_after:
            return math.nan
        x, y = np.asarray(lam["x"]), np.asarray(lam["y"])
        return float(np.exp(x).prod() + np.sin(3 * y * x[0]).sum())


def at(y_moves: bool = True) -> Params:
    return {
        "x": torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True),
        "y": torch.tensor([[0.5], [0.1], [-0.4]], dtype=F64, requires_grad=y_moves),
    }


def truth(lam: Params) -> Params:
    free = {k: v.detach().clone().requires_grad_() for k, v in lam.items()}
    x, y = free.values()
    (x.exp().prod() + (3 * y * x[0]).sin().sum()).backward()
    return {k: v.grad for k, v in free.items()}


@pytest.mark.parametrize(("central", "calls", "rtol"), [(False, 6, 2e-3), (True, 11, 1e-6)])
def test_backward_takes_differences(central: bool, calls: int, rtol: float) -> None:
    box, lam = Counted(), at()
    value = ohg.evaluate(box, lam, estimator=ohg.ZerothOrder(None, central=central))
    assert len(box.asked) == 1
    assert float(value.detach()) == Counted()(lam_of(lam))
    (3.0 * value).backward()
    assert len(box.asked) == calls
    assert relative_error({k: v.grad / 3.0 for k, v in lam.items()}, truth(lam)) < rtol


def lam_of(lam: Params) -> Params:
    return {k: v.detach() for k, v in lam.items()}


def test_the_default_takes_as_many_directions_as_there_are_entries() -> None:
    lam = {"x": torch.linspace(-1, 1, 12, dtype=F64).requires_grad_()}
    ohg.evaluate(lambda p: float((p["x"] ** 2).sum()), lam).backward()
    assert relative_error({"x": lam["x"].grad}, {"x": 2 * lam["x"].detach()}) < 1e-3


def test_what_requires_no_grad_is_not_displaced() -> None:
    box, lam = Counted(), at(y_moves=False)
    ohg.evaluate(box, lam).backward()
    assert len(box.asked) == 3
    assert all(torch.equal(asked["y"], lam["y"]) for asked in box.asked)
    assert all(list(asked) == ["x", "y"] for asked in box.asked)
    assert relative_error({"x": lam["x"].grad}, {"x": truth(lam)["x"]}) < 1e-3


def test_without_a_backward_pass_there_is_one_call() -> None:
    box = Counted()
    with torch.no_grad():
        assert not ohg.evaluate(box, at()).requires_grad
    assert not ohg.evaluate(box, lam_of(at())).requires_grad
    assert len(box.asked) == 2


def test_gradients_flow_on_through_logarithms() -> None:
    rate = torch.tensor(2e-3, dtype=F64, requires_grad=True)
    value = ohg.evaluate(
        lambda lam: float(np.exp(2 * np.asarray(lam["log_rate"]))),
        {"log_rate": rate.log()},
        estimator=ohg.ZerothOrder(None, central=True),
    )
    value.backward()
    assert float(rate.grad) == pytest.approx(2 * 2e-3, rel=1e-6)


def test_few_directions_differ_from_step_to_step() -> None:
    def gradient(step: int) -> Tensor:
        lam = at()
        ohg.evaluate(Counted(), lam, estimator=ohg.ZerothOrder(1), step=step).backward()
        return lam["x"].grad

    assert torch.equal(gradient(3), gradient(3))
    assert len({tuple(gradient(i).tolist()) for i in range(5)}) > 1


@pytest.mark.parametrize("broken_after", [0, 2])
def test_values_that_are_not_finite_fail_and_name_the_black_box(broken_after: int) -> None:
    def fragile(lam: Params) -> float:
        return box(lam)

    box = Counted(broken_after)
    with pytest.raises(ohg.SolverError, match="The black box fragile returned nan for 'x' in"):
        ohg.evaluate(fragile, at()).backward()
    assert len(box.asked) == broken_after + 1


def test_values_that_stay_the_same_are_no_silent_zero() -> None:
    with pytest.raises(ohg.SolverError, match=r"to the last bit .* piecewise constant"):
        ohg.evaluate(lambda lam: 1.0, at()).backward()


@pytest.mark.parametrize(
    ("function", "lam", "settings", "error", "message"),
    [
        (lambda lam: "no", at(), {}, ohg.ObjectiveError, "returned 'no'; return a number"),
        (lambda lam: {"w": np.zeros(2)}, at(), {}, ohg.ObjectiveError, "returned {'w'"),
        (Counted(), {}, {}, ohg.HyperparameterError, "non-empty dict"),
        (Counted(), at(), {"estimator": ohg.Unroll()}, ohg.RequirementError, "takes differences"),
        (
            Counted(),
            {"x": torch.full((1,), 1e3).requires_grad_()},
            {},
            ohg.RequirementError,
            "rounding of 'x'",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_words(
    function: Any, lam: Params, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ohg.evaluate(function, lam, **settings)


def study_of(box: Any, num_trials: int, catch: Any = ()) -> tuple[optuna.Study, Any]:
    @ohg.differentiable
    def objective(trial: ohg.DifferentiableTrial) -> Tensor:
        rate = trial.suggest_float("rate", 1e-4, 1e-1, log=True, init=5e-2)
        return ohg.evaluate(box, {"log_rate": rate.log()})

    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=num_trials, catch=catch)
    return study, objective


def test_a_study_of_a_black_box() -> None:
    def box(lam: Params) -> float:
        calls.append(lam)
        return float((np.asarray(lam["log_rate"]) - math.log(2e-3)) ** 2)

    calls: list[Params] = []
    study, objective = study_of(box, 8)
    assert study.best_params["rate"] == pytest.approx(2e-3, rel=1e-3)
    assert len(calls) == 16  # a value and a difference each
    assert objective(optuna.trial.FixedTrial(study.best_params)) == study.best_value
    assert len(calls) == 17


def test_a_black_box_that_breaks_takes_the_step_back() -> None:
    def box(lam: Params) -> float:
        x = float(lam["log_rate"])
        return math.nan if x < math.log(1e-2) else x

    study, _ = study_of(box, 6)
    states = [t.state for t in study.trials]
    assert optuna.trial.TrialState.FAIL in states
    assert 1e-2 <= study.best_params["rate"] < 2e-2
