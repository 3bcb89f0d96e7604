"""Optuna's own figures of our studies: they show what was learned, and not where it began."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
import torch
from optuna import visualization
from optuna.trial import TrialState
from torch import Tensor

import optuna_hypergrad as ohg

LEARNED = {"x": 0.7, "rate": 0.02}


@ohg.differentiable
def objective(trial: Any) -> Tensor:
    kind = trial.suggest_categorical("kind", ["a", "b"])
    x = trial.suggest_float("x", -1.0, 1.0)
    rate = trial.suggest_float("rate", 1e-4, 1.0, log=True)
    decay = trial.suggest_tensor("decay", (3, 2), 1e-3, 10.0, log=True, dtype=torch.float64)
    loss = (x - LEARNED["x"]) ** 2 + (rate.log10() - torch.tensor(LEARNED["rate"]).log10()) ** 2
    return loss + (decay.log10() ** 2).sum() + 0.3 * (kind == "b") + 1.0


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=25)
    study.tell(study.ask(), state=TrialState.FAIL)
    return study


def complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(states=[TrialState.COMPLETE])


def numbers(figure: Any, axis: str, mode: str = "markers") -> list[list[Any]]:
    return [list(getattr(t, axis)) for t in figure.data if mode in (getattr(t, "mode", None) or "")]


def test_what_was_learned_is_in_the_best_trial(study: optuna.Study) -> None:
    first, best = study.trials[0].params, study.best_trial.params
    for name, value in LEARNED.items():
        assert best[name] == pytest.approx(value, rel=1e-2)
        assert first[name] != pytest.approx(value, rel=0.1)


def test_history(study: optuna.Study) -> None:
    figure = visualization.plot_optimization_history(study)
    values = [t.value for t in complete(study)]
    assert numbers(figure, "y")[0] == values
    (best,) = [t.y for t in figure.data if t.name == "Best Value"]
    assert best[-1] == study.best_value == min(values)


def test_slice(study: optuna.Study) -> None:
    figure = visualization.plot_slice(study, params=["x", "rate", "kind"])
    shown = {
        tuple(x): tuple(y) for x, y in zip(numbers(figure, "x"), numbers(figure, "y"), strict=True)
    }
    for name in ("x", "rate", "kind"):
        points = {(_axis(t.params[name]), t.value) for t in complete(study)}
        assert points in [set(zip(x, y, strict=True)) for x, y in shown.items()]


def _axis(value: Any) -> Any:
    return repr(value) if isinstance(value, str) else value


@pytest.mark.parametrize("draw", [visualization.plot_contour, visualization.plot_rank])
def test_two_parameters(draw: Any, study: optuna.Study) -> None:
    figure = draw(study, params=["x", "rate"])
    axes = figure.layout.xaxis.title.text, figure.layout.yaxis.title.text
    assert set(axes) == {"x", "rate"}
    points = {(t.params[axes[0]], t.params[axes[1]]) for t in complete(study)}
    shown = zip(numbers(figure, "x"), numbers(figure, "y"), strict=True)
    assert points in [set(zip(xs, ys, strict=True)) for xs, ys in shown]


def test_parallel_coordinate(study: optuna.Study) -> None:
    figure = visualization.plot_parallel_coordinate(study, params=["x", "kind"])
    titles = list(figure.layout.xaxis.ticktext)
    for title, values in (
        ("Objective Value", [t.value for t in complete(study)]),
        ("x", [t.params["x"] for t in complete(study)]),
    ):
        at = titles.index(title)
        shown = [line.y[at] for line in figure.data if line.mode == "lines"]
        scaled = [(v - min(values)) / (max(values) - min(values)) for v in values]
        assert sorted(shown) == pytest.approx(sorted(scaled), abs=1e-12)


def test_timeline(study: optuna.Study) -> None:
    figure = visualization.plot_timeline(study)
    bars = {t.name: len(t.y) for t in figure.data if t.y is not None and len(t.y)}
    assert (bars["COMPLETE"], bars["FAIL"]) == (25, 1)


def test_empirical_distribution(study: optuna.Study) -> None:
    figure = visualization.plot_edf(study)
    x, y = figure.data[0].x, figure.data[0].y
    assert (min(x), max(x)) == (
        min(v.value for v in complete(study)),
        max(v.value for v in complete(study)),
    )
    assert y[-1] == 1.0


def test_importances(study: optuna.Study) -> None:
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    figure = visualization.plot_param_importances(study, evaluator=evaluator)
    assert set(figure.data[0].y) == {"x", "rate", "kind"}
    assert sum(figure.data[0].x) == pytest.approx(1.0)


def test_intermediate_values_of_a_bilevel_run() -> None:
    def inner(w: Any, lam: Any, batch: None) -> Tensor:
        return ((w["w"] - 1.0) ** 2).sum() / 2 + (lam["decay"] * w["w"] ** 2).sum() / 2

    def outer(w: Any, lam: Any, batch: None) -> Tensor:
        return ((w["w"] - 0.4) ** 2).sum()

    values = []

    def run(trial: optuna.Trial) -> float:
        found = ohg.minimize_bilevel(
            ohg.BilevelProblem(inner, outer),
            {"w": torch.zeros(2, dtype=torch.float64)},
            {"decay": torch.full((2,), 0.1, dtype=torch.float64)},
            inner_solver=ohg.GradientDescent(
                trial.suggest_float("step_size", 0.2, 0.3), max_steps=2
            ),
            bounds={"decay": ohg.Domain(1e-3, 10.0, log=True)},
            num_steps=450,
            trial=trial,
        )
        values.append([r["outer_value"] for r in found.history])
        return found.outer_value

    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.NopPruner()
    )
    study.optimize(run, n_trials=1)
    figure = visualization.plot_intermediate_values(study)
    x, y = figure.data[0].x, figure.data[0].y
    assert len(x) <= 200
    assert list(y) == [values[0][i] for i in x]


def test_numbers_about_hypergradients_are_targets(study: optuna.Study) -> None:
    figure = visualization.plot_optimization_history(
        study, target=lambda t: t.user_attrs["hypergradient_norm"], target_name="norm"
    )
    assert numbers(figure, "y")[0] == [t.user_attrs["hypergradient_norm"] for t in complete(study)]
