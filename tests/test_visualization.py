"""Figures of trajectories, hypergradients and tensors show what is in the study, and no more."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import drawn_studies as figures
import matplotlib
import numpy as np
import optuna
import pytest
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import visualization as vis

matplotlib.use("Agg")
FIRST = ("plot_trajectories", "plot_hypergradient_norms", "plot_tensor_evolution")
BOTH = pytest.mark.parametrize("drawn", [vis, vis.matplotlib], ids=["plotly", "matplotlib"])


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def lines_of(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Name -> x, y of each trace or line, also of points."""
    if hasattr(figure, "data"):
        return {t.name: (list(t.x), list(t.y)) for t in figure.data}
    found = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.lines
    }
    for points in figure.collections:
        x, y = np.asarray(points.get_offsets()).T
        found.setdefault(points.get_label(), (list(x), list(y)))
    return found


def titles_of(figure: Any) -> tuple[str, str, str]:
    if hasattr(figure, "data"):
        layout = figure.layout
        return layout.title.text, layout.xaxis.title.text, layout.yaxis.title.text
    return figure.get_title(), figure.get_xlabel(), figure.get_ylabel()


def is_empty(figure: Any) -> bool:
    if hasattr(figure, "data"):
        return not figure.data
    return not (figure.lines or figure.collections or figure.images or figure.patches)


def is_log(figure: Any) -> bool:
    return (
        figure.layout.yaxis.type == "log"
        if hasattr(figure, "data")
        else figure.get_yscale() == "log"
    )


def members(study: optuna.Study) -> dict[int, list[optuna.trial.FrozenTrial]]:
    """Trials by trajectory, from the database."""
    found: dict[int, list[optuna.trial.FrozenTrial]] = {}
    for trial in study.trials:
        found.setdefault(trial.system_attrs["hypergrad:claim"]["trajectory"], []).append(trial)
    return found


@BOTH
def test_trajectories_are_those_of_the_database(drawn: Any) -> None:
    study = figures.numbers()
    figure = drawn.plot_trajectories(study)
    assert titles_of(figure) == ("Trajectories", "Outer step", "Objective Value")
    found = lines_of(figure)
    expected = members(study)
    assert len(expected) > 2
    for number, trials in expected.items():
        x, y = found.pop(f"Trajectory {number}: width={trials[0].params['width']}")
        assert x == list(range(len(trials)))
        assert y == [t.value for t in trials]
    (label, (x, y)) = found.popitem()
    assert label == f"Best: {study.best_value:.4g}"
    assert y == [study.best_value]
    owner = study.best_trial.system_attrs["hypergrad:claim"]["trajectory"]
    assert x == [[t.number for t in expected[owner]].index(study.best_trial.number)]
    assert not found
    assert not is_log(figure)


def test_hover_says_trial_and_setting() -> None:
    study = figures.numbers()
    trace = vis.plot_trajectories(study).data[0]
    assert list(trace.customdata) == [t.number for t in members(study)[0]]
    assert f"width={study.trials[0].params['width']}" in trace.hovertemplate


@BOTH
def test_trajectories_of_something_else(drawn: Any) -> None:
    study = figures.numbers()
    figure = drawn.plot_trajectories(
        study, target=lambda t: 10 ** t.params["width"], target_name="tenfold"
    )
    assert titles_of(figure)[2] == "tenfold"
    assert is_log(figure)
    assert not is_log(drawn.plot_trajectories(study, log=False))
    found = lines_of(figure)
    assert not any("Best" in name for name in found)
    for number, trials in members(study).items():
        width = trials[0].params["width"]
        assert found[f"Trajectory {number}: width={width}"][1] == [10.0**width] * len(trials)


@BOTH
def test_the_best_trajectories_have_a_color(drawn: Any) -> None:
    study = figures.numbers()
    found = lines_of(drawn.plot_trajectories(study, n_trajectories=1))
    owner = study.best_trial.system_attrs["hypergrad:claim"]["trajectory"]
    named = [name for name in found if name.startswith("Trajectory")]
    assert [name.split(":")[0] for name in named] == [f"Trajectory {owner}"]
    assert "Others" in found
    shown = drawn.plot_trajectories(
        study, n_trajectories=1, target=lambda t: -t.value, target_name="-"
    )
    assert [n for n in lines_of(shown) if n.startswith("Traj")] == named


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_best_is_that_of_the_direction(direction: str) -> None:
    sign = 1.0 if direction == "minimize" else -1.0

    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        return sign * figures.with_numbers.__wrapped__(trial)

    study = optuna.create_study(direction=direction, sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=12)
    figure = vis.plot_trajectories(study, n_trajectories=1)
    found = lines_of(figure)
    owner = study.best_trial.system_attrs["hypergrad:claim"]["trajectory"]
    assert f"Trajectory {owner}: width={study.best_params['width']}" in found
    assert found[f"Best: {study.best_value:.4g}"][1] == [study.best_value]


def test_damaged_trials_are_left_out_with_a_warning() -> None:
    study = figures.new_study()
    study.optimize(figures.with_numbers, n_trials=3)
    other = optuna.create_study()
    for trial in study.trials:
        if trial.number == 1:
            trial.system_attrs["hypergrad:outcome"] = {"kind": "nonsense"}
        other.add_trial(trial)
    with figures.told() as warnings:
        found = lines_of(vis.plot_trajectories(other))
    assert any("'hypergrad:outcome' of trial 1 is damaged" in w for w in warnings)
    assert study.trials[0].value in next(y for n, (_, y) in found.items() if n.startswith("Traj"))


@BOTH
def test_runs_are_lines_that_end_in_what_they_returned(drawn: Any) -> None:
    study = figures.runs()
    found = lines_of(drawn.plot_trajectories(study))
    for trial in study.trials:
        x, y = found[f"Run {trial.number}: rate={trial.params['rate']:.4g}"]
        assert x == list(range(9))
        assert y == [trial.intermediate_values[s] for s in x]
    assert found[f"Best: {study.best_value:.4g}"] == ([9], [study.best_value])
    if drawn is vis:
        assert found["Returned"] == ([9] * 3, [t.value for t in study.trials])


@BOTH
def test_mixed_studies(drawn: Any) -> None:
    study = figures.mixed()
    found = lines_of(drawn.plot_trajectories(study))
    assert found["No hypergradient"] == ([0] * 4, [t.value for t in study.trials[:4]])
    lines = [y for name, (_, y) in found.items() if name.startswith("Trajectory")]
    values = sorted(v for y in lines for v in y)
    ours = study.trials[4:]
    assert values == sorted(t.value for t in ours if t.state.name == "COMPLETE")
    norms = lines_of(drawn.plot_hypergradient_norms(study))
    assert sum(len(y) for name, (_, y) in norms.items() if name.startswith("Traj")) <= len(values)


@BOTH
def test_a_study_of_optuna_alone(drawn: Any) -> None:
    study = figures.foreign()
    with figures.told() as warnings:
        found = lines_of(drawn.plot_trajectories(study))
        assert is_empty(drawn.plot_hypergradient_norms(study))
        assert is_empty(drawn.plot_tensor_evolution(study))
    assert found.keys() == {"No hypergradient", f"Best: {study.best_value:.4g}"}
    assert len(warnings) == 3
    assert "trajectories: none had a hypergradient" in warnings[0]
    assert "does not have any tensors" in warnings[2]


@BOTH
def test_one_trial(drawn: Any) -> None:
    study = figures.new_study()
    study.optimize(figures.with_tensors, n_trials=1)
    found = lines_of(drawn.plot_trajectories(study))
    assert found["Trajectory 0"] == ([0], [study.best_value])
    figure = drawn.plot_tensor_evolution(study, "decay")
    assert not is_empty(figure)
    assert not is_empty(drawn.plot_tensor_evolution(study, "decay", mode="histogram"))
    study = figures.new_study()
    study.optimize(figures.with_numbers, n_trials=1)
    assert len(lines_of(drawn.plot_hypergradient_norms(study))["Trajectory 0: width=3"][1]) == 1


@BOTH
@pytest.mark.parametrize("kind", figures.NOTHING)
@pytest.mark.parametrize("name", FIRST)
def test_studies_without_anything(drawn: Any, name: str, kind: str) -> None:
    study = figures.NOTHING[kind]()
    with figures.told() as warnings:
        figure = getattr(drawn, name)(study)
    assert is_empty(figure)
    assert titles_of(figure)[0]
    assert [study.study_name in w and "does not have any" in w for w in warnings] == [True]


@pytest.mark.parametrize("name", FIRST)
def test_several_objectives_are_refused(name: str) -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(ohg.RequirementError, match="2 objectives, and trajectories follow one"):
        getattr(vis, name)(study)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@BOTH
def test_norms_are_those_of_the_gradient_in_natural_steps(drawn: Any, direction: str) -> None:
    """By hand: d/d(log x), and a tenth of a bounded range; at the bound y cannot move on."""
    sign = 1.0 if direction == "minimize" else -1.0

    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        return sign * figures.with_numbers.__wrapped__(trial)

    sampler = ohg.HypergradientSampler(seed=0, publish=False)  # no norm is recorded
    study = optuna.create_study(direction=direction, sampler=sampler)
    study.optimize(objective, n_trials=15)
    found = lines_of(drawn.plot_hypergradient_norms(study))
    seen_at_bound = 0
    for number, trials in members(study).items():
        _, y = found[f"Trajectory {number}: width={trials[0].params['width']}"]
        for norm, trial in zip(y, trials, strict=True):
            slope_x = 2 * (math.log(trial.params["x"]) - 1)
            slope_y = 0.5 * 0.2 * (trial.params["y"] + 1)
            at_bound = trial.params["y"] == 0.0
            seen_at_bound += at_bound
            truth = math.hypot(slope_x, 0.0 if at_bound else slope_y)
            shown = 0.0 if norm is None or math.isnan(norm) else norm
            assert shown == pytest.approx(truth, rel=1e-9, abs=1e-13)
    assert seen_at_bound


@BOTH
def test_a_norm_of_zero_has_a_place(drawn: Any) -> None:
    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        return (trial.suggest_float("x", 0.0, 1.0, init=0.75)) ** 2

    study = figures.new_study()
    study.optimize(objective, n_trials=8)
    assert 0.0 in study.best_params.values()
    figure = drawn.plot_hypergradient_norms(study)
    assert is_log(figure)
    x, y = lines_of(figure)["Exactly 0"]
    assert [study.trials[int(i)].params["x"] for i in x] == [0.0] * len(x)
    assert min(y) > 0


@BOTH
def test_norms_of_runs_come_from_their_checkpoints(drawn: Any) -> None:
    study = figures.runs()
    rate = study.trials[-1].params["rate"]
    with figures.told():
        found = lines_of(drawn.plot_hypergradient_norms(study))
    x, y = found[f"Run 2: rate={rate:.4g}"]
    assert x == list(range(9))
    inner = torch.zeros_like(figures.TARGET)  # by hand: x = 0 at the start, and so stays w
    shrink = (1 - 2 * rate) ** 2
    slope = 2 * (inner - figures.TARGET) * 0.4  # dw/dx = 1 for the exact inverse; unit 0.4
    assert y[0] == pytest.approx(float(slope.norm()), rel=1e-6), shrink


def test_norms_that_are_recorded_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    study = figures.new_study()
    study.optimize(figures.with_tensors, n_trials=2)
    with figures.told() as warnings:
        figure = vis.plot_hypergradient_norms(study)
    recorded = [t.user_attrs.get("hypergradient_norm") for t in study.trials]
    if None in recorded:
        assert is_empty(figure)
        assert "of tensors no norm was recorded" in warnings[0]
        tell = optuna.trial.Trial.set_user_attr

        @ohg.differentiable
        def objective(trial: Any) -> Tensor:
            tell(trial, "hypergradient_norm", 0.5 + trial.number)
            return figures.with_tensors.__wrapped__(trial)

        study = figures.new_study()
        study.optimize(objective, n_trials=2)
        recorded, figure = [0.5, 1.5], vis.plot_hypergradient_norms(study)
    assert lines_of(figure)["Trajectory 0"] == ([0, 1], recorded)


LEVELS = {
    "minimum": 0.0,
    "5 %": 0.05,
    "25 %": 0.25,
    "median": 0.5,
    "75 %": 0.75,
    "95 %": 0.95,
    "maximum": 1.0,
}


def test_evolution_shows_quantiles_of_the_stored_tensors() -> None:
    study = figures.tensors()
    figure = vis.plot_tensor_evolution(study, "decay")
    title, x, y = titles_of(figure)
    assert title == "Evolution of decay (trajectory 0, 40 entries)"
    assert (x, y) == ("Outer step", "decay")
    assert is_log(figure)
    found = {name.split(" to ")[0]: line for name, line in lines_of(figure).items()}
    assert found.keys() == LEVELS.keys()
    for name, level in LEVELS.items():
        assert found[name][0] == list(range(7))
        for step, number in zip(*found[name], strict=True):
            stored = ohg.load_tensors(study.trials[step], "decay", study=study)["decay"]
            assert number == pytest.approx(float(stored.flatten().quantile(level)), rel=1e-3)


def test_evolution_with_matplotlib_has_the_same_numbers() -> None:
    study = figures.tensors()
    ax = vis.matplotlib.plot_tensor_evolution(study, "decay", quantiles=[0.1, 0.5, 0.9])
    x, y = lines_of(ax)["median"]
    assert x == list(range(7))
    truth = [ohg.load_tensors(t, "decay", study=study)["decay"] for t in study.trials]
    assert y == pytest.approx([float(v.quantile(0.5)) for v in truth])
    assert is_log(ax)
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(min(float(v.quantile(0.1)) for v in truth))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["10 % to 90 %", "median"]


def test_evolution_of_a_dict_is_that_of_all_its_entries() -> None:
    study = figures.tensors()
    tree = ohg.load_tensors(study.trials[3], "tree", study=study)["tree"]
    figure = vis.plot_tensor_evolution(study, "tree", quantiles=[0.5])
    everything = torch.cat([v.flatten() for v in tree.values()])
    assert lines_of(figure)["median"][1][3] == pytest.approx(float(everything.quantile(0.5)))
    assert not is_log(figure)
    figure = vis.plot_tensor_evolution(study, "tree/0.weight", quantiles=[0.5])
    assert lines_of(figure)["median"][1][3] == pytest.approx(float(tree["0.weight"].quantile(0.5)))
    assert titles_of(figure)[0] == "Evolution of tree/0.weight (trajectory 0, 12 entries)"
    assert titles_of(vis.plot_tensor_evolution(study))[0].startswith("Evolution of decay")


@BOTH
def test_histogram_counts_every_entry(drawn: Any) -> None:
    study = figures.tensors()
    figure = drawn.plot_tensor_evolution(study, "decay", mode="histogram")
    if drawn is vis:
        (trace,) = figure.data
        shares, x, y = np.array(trace.z, dtype=float), list(trace.x), list(trace.y)
        assert (trace.zmin, trace.colorbar.title.text) == (0, "% of entries")
    else:
        mesh = figure.collections[0]
        shares, x = np.ma.filled(mesh.get_array(), np.nan).reshape(40, 7), list(range(7))
        shares = np.nan_to_num(shares)
        edges = mesh.get_coordinates()[:, 0, 1]
        y = list(np.sqrt(edges[1:] * edges[:-1]))
    assert x == list(range(7))
    assert shares.sum(0) == pytest.approx([100.0] * 7, abs=0.1)
    for step, trial in enumerate(study.trials):
        logs = ohg.load_tensors(trial, "decay", study=study)["decay"].log()
        mean = (shares[:, step] * np.log(y)).sum() / 100
        assert mean == pytest.approx(float(logs.mean()), abs=0.3)
    assert is_log(figure)


def test_evolution_of_runs_goes_by_trial() -> None:
    study = figures.runs()
    figure = vis.plot_tensor_evolution(study, "bilevel/x", quantiles=[0.0, 1.0])
    assert titles_of(figure)[:2] == ("Evolution of bilevel/x (runs, 12 entries)", "Trial")
    found = lines_of(figure)
    for trial in study.trials:
        x = ohg.load_tensors(trial, study=study)["bilevel"]["x"]
        assert found["maximum"][1][trial.number] == pytest.approx(float(x.max()))


def there(study: optuna.Study) -> list[int]:
    """Trials whose tensors can be loaded."""
    found = []
    for trial in study.trials:
        with contextlib.suppress(ohg.MissingTensorError):
            ohg.load_tensors(trial, study=study)
            found.append(trial.number)
    return found


def test_evolution_shows_what_retention_has_left() -> None:
    study = figures.new_study(newest=1, best=0, every=4)
    study.optimize(figures.with_tensors, n_trials=7)
    figure = vis.plot_tensor_evolution(study, "decay", quantiles=[0.5])
    assert lines_of(figure)["median"][0] == there(study)
    assert len(there(study)) < 7
    some = vis.plot_tensor_evolution(figures.tensors(), "decay", n_steps=3)
    assert lines_of(some)["median"][0] == [0, 3, 6]


def test_summaries_stand_for_tensors_that_are_gone() -> None:
    summary = {"min": 1.0, "q05": 2.0, "q25": 3.0, "q50": 4.0, "q75": 5.0, "q95": 6.0, "max": 7.0}

    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        trial.set_user_attr("tensor:decay", summary if trial.number == 2 else "damaged")
        return figures.with_tensors.__wrapped__(trial)

    study = figures.new_study(newest=1, best=0, every=4)
    study.optimize(objective, n_trials=7)
    x, y = lines_of(vis.plot_tensor_evolution(study, "decay"))["median"]
    assert 2 not in there(study)
    assert y[x.index(2)] == 4.0
    assert set(x) >= {*there(study), 2}


def test_what_does_not_exist_is_said() -> None:
    study = figures.tensors()
    with pytest.raises(ohg.MissingTensorError, match=r"did you mean 'decay'\?"):
        vis.plot_tensor_evolution(study, "decai")
    with pytest.raises(ohg.MissingTensorError, match=r"no entry '0\.weigth'.*'tree/0\.weight'\?"):
        vis.plot_tensor_evolution(study, "tree/0.weigth")
    with pytest.raises(ohg.MissingTensorError, match=r"no trajectory 3; .* began with trials 0"):
        vis.plot_tensor_evolution(study, "decay", trajectory=3)
    for settings in (
        {"mode": "bars"},
        {"quantiles": [0.5, 0.1]},
        {"quantiles": []},
        {"quantiles": [2.0]},
        {"n_steps": 0},
        {"trajectory": -1},
    ):
        with pytest.raises(ValueError, match="plot_tensor_evolution needs"):
            vis.plot_tensor_evolution(study, "decay", **settings)
    with pytest.raises(ValueError, match="n_trajectories >= 1"):
        vis.plot_trajectories(study, n_trajectories=0)
    with pytest.raises(ValueError, match="target"):
        vis.plot_trajectories(study, target="x")
    store = study.sampler.store_of(study)
    other = figures.new_study()
    other.optimize(figures.with_tensors, n_trials=1)
    pointers = store.pointers(other.trials[0])
    other.sampler.store_of(other).discard(*pointers)
    with pytest.raises(ohg.MissingTensorError):
        vis.plot_tensor_evolution(other, "decay")


def large_study() -> optuna.Study:
    """200 trajectories of 40 steps, as the database would have them; names at their longest."""
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    rng = np.random.default_rng(0)
    distribution = optuna.distributions.FloatDistribution(1e-6, 1e6, log=True)
    choices = [f"{i} {'a long name of a choice ' * 12}" for i in range(200)]
    kind = optuna.distributions.CategoricalDistribution(choices)
    for i in range(200):
        for step in range(20):
            number = 20 * i + step
            value = float(rng.lognormal())
            gradient = {"names": ["x"], "float64": _packed(rng.normal())}
            parent = number - 1 if step else None
            claim = {"trajectory": 20 * i, "parent": parent, "source": "init"}
            outcome = {
                "kind": "good",
                "trajectory": 20 * i,
                "parent": parent,
                "value": value,
                "stop": None,
                "numbers": None,
                "definitions": {},
                "held": [],
            }
            study.add_trial(
                optuna.create_trial(
                    value=value,
                    params={"x": float(rng.lognormal()), "kind": choices[i]},
                    distributions={"x": distribution, "kind": kind},
                    system_attrs={
                        "hypergrad:claim": claim,
                        "hypergrad:gradient": gradient,
                        "hypergrad:outcome": outcome,
                    },
                )
            )
    return study


def _packed(value: float) -> str:
    import base64

    return base64.b64encode(np.array([value]).tobytes()).decode()


def test_figures_stay_small() -> None:
    study = large_study()
    for draw in (vis.plot_trajectories, vis.plot_hypergradient_norms):
        text = draw(study).to_json()
        assert len(text) <= 30_000, (draw.__name__, len(text))
        assert len(draw(study).data) >= 11
        assert json.loads(text)["data"]
    best = vis.plot_trajectories(study).data[-1]
    assert list(best.y) == [study.best_value]
    long = max(
        (t for t in vis.plot_trajectories(study).data if t.name.startswith("Traj")),
        key=lambda t: len(t.x),
    )
    assert len(long.name) < 80


def test_a_million_entries_give_a_small_figure() -> None:
    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        decay = trial.suggest_tensor(
            "decay", (1000, 1000), 1e-6, 1.0, log=True, dtype=torch.float32
        )
        return (decay.log() + torch.linspace(0, 9, 1000)).square().mean()

    study = figures.new_study(every=1)
    study.optimize(objective, n_trials=3)
    for mode in ("quantiles", "histogram"):
        assert len(vis.plot_tensor_evolution(study, mode=mode).to_json()) < 30_000


WITHOUT = """
import sys
sys.modules["plotly"] = sys.modules["plotly.graph_objects"] = None
sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = None
import optuna
from optuna_hypergrad import visualization as vis
assert not vis.is_available() and not vis.matplotlib.is_available()
for module in (vis, vis.matplotlib):
    try:
        module.plot_trajectories(optuna.create_study())
    except ImportError as error:
        print(error)
"""


def test_without_plotly_and_matplotlib_figures_say_so() -> None:
    assert vis.is_available()
    assert vis.matplotlib.is_available()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Tried to import 'plotly" in done.stdout
    assert "Tried to import 'matplotlib" in done.stdout


def test_importing_the_library_imports_neither() -> None:
    code = (
        "import sys, optuna_hypergrad; print('plotly' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_axes_are_drawn_on_and_settings_stay() -> None:
    before = dict(plt.rcParams)
    figure, (left, right) = plt.subplots(1, 2)
    assert vis.matplotlib.plot_trajectories(figures.numbers(), ax=left) is left
    assert vis.matplotlib.plot_hypergradient_norms(figures.numbers(), ax=right) is right
    assert dict(plt.rcParams) == before
    assert len(figure.axes) == 2


def _signature(function: Callable[..., Any]) -> dict[str, Any]:
    import inspect

    found = inspect.signature(function).parameters
    return {n: (p.kind, p.default) for n, p in found.items() if n != "ax"}


@pytest.mark.parametrize("name", [n for n in vis.__all__ if n.startswith("plot_")])
def test_both_kinds_take_the_same_arguments(name: str) -> None:
    assert _signature(getattr(vis, name)) == _signature(getattr(vis.matplotlib, name))
    for drawn in (vis, vis.matplotlib):
        doc = getattr(drawn, name).__doc__
        assert "Example::" in doc
        assert "Returns:" in doc
    assert set(vis.matplotlib.__all__) == set(vis.__all__) - {"matplotlib", "sweep_estimators"}


HOSTILE = "<b>$^$ %{y} & _x"


@BOTH
def test_odd_names_are_shown_as_they_are(drawn: Any) -> None:
    @ohg.differentiable
    def objective(trial: Any) -> Tensor:
        trial.suggest_categorical(HOSTILE, [HOSTILE])
        x = trial.suggest_tensor(HOSTILE + "tensor", (3,), 0.0, 1.0)
        return (x - 0.2).square().sum()

    study = figures.new_study()
    study.optimize(objective, n_trials=2)
    pictures = [
        drawn.plot_trajectories(study, target_name=HOSTILE),
        drawn.plot_tensor_evolution(study),
        drawn.plot_extreme_hyperparameters(study, labels=[HOSTILE] * 3),
        drawn.plot_layers({HOSTILE: [1.0, 2.0], "other": [3.0]}),
        drawn.plot_sample_weights(study, truth=[True, False, True], names=(HOSTILE, "others")),
        drawn.plot_cost_against_error({HOSTILE: [(1.0, 2.0)]}, cost_name=HOSTILE),
    ]
    for picture in pictures:
        if drawn is vis:
            text = picture.to_json()
            assert "<b>" not in text
            assert "\\u003cb\\u003e" not in text
            assert "%{y} &" not in text
        else:
            picture.figure.canvas.draw()  # formulas would be read here


@BOTH
def test_the_last_norm_of_a_run_without_a_checkpoint(drawn: Any) -> None:
    def objective(trial: optuna.Trial) -> float:
        value = figures.bilevel(trial)
        trial.set_user_attr("hypergradient_norm", 0.25)
        trial.set_user_attr("outer_steps", 9)
        return value

    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=4)
    found = lines_of(drawn.plot_hypergradient_norms(study))
    rate = study.trials[0].params["rate"]
    assert found[f"Run 0: rate={rate:.4g}"] == ([8], [0.25])
    assert len(found[f"Run 3: rate={study.trials[3].params['rate']:.4g}"][0]) == 9


@BOTH
def test_runs_that_were_pruned_or_go_on(drawn: Any) -> None:
    pruner = optuna.pruners.ThresholdPruner(lower=4.0, n_warmup_steps=2)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0), pruner=pruner)
    study.optimize(figures.bilevel, n_trials=2)
    assert {t.state.name for t in study.trials} == {"PRUNED"}
    found = lines_of(drawn.plot_trajectories(study))
    assert len(found) == 2
    for trial in study.trials:
        x, y = found[f"Run {trial.number}: rate={trial.params['rate']:.4g}"]
        assert x == sorted(trial.intermediate_values)
        assert y == [trial.intermediate_values[s] for s in x]
        assert 2 < len(x) < 9
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    trial = study.ask()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "should_prune", lambda: len(study.trials[0].intermediate_values) == 5)
        with pytest.raises(optuna.TrialPruned):
            figures.bilevel(trial)
    assert study.trials[0].state.name == "RUNNING"
    ((name, (x, _)),) = lines_of(drawn.plot_trajectories(study)).items()
    assert name.startswith("Run 0")
    assert x == [0, 1, 2, 3, 4]
