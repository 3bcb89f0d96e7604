"""Figures of single tensors, images, sample weights, retrained values, spectra and costs show what they were given."""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
import textwrap
from collections.abc import Callable
from typing import Any

import drawn_studies as figures
import matplotlib
import numpy as np
import optuna
import pandas as pd
import problems
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.metrics import roc_auc_score
from test_visualization import BOTH, is_empty, is_log, lines_of, titles_of
from torch import Tensor, nn

import optuna_hypergrad as ohg
from optuna_hypergrad import visualization as vis

matplotlib.use("Agg")
OF_A_TENSOR = (
    "plot_extreme_hyperparameters",
    "plot_layers",
    "plot_sample_weights",
    "plot_images",
)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def is_log_x(figure: Any) -> bool:
    return (
        figure.layout.xaxis.type == "log"
        if hasattr(figure, "data")
        else figure.get_xscale() == "log"
    )


def row_names(figure: Any) -> list[str]:
    if hasattr(figure, "data"):
        return list(figure.layout.yaxis.ticktext)
    return [t.get_text() for t in figure.get_yticklabels()]


def best_decay() -> Tensor:
    return ohg.load_tensors(figures.tensors())["decay"]


# Extreme hyperparameters


@BOTH
def test_extremes_by_name(drawn: Any) -> None:
    figure = drawn.plot_extreme_hyperparameters(figures.tensors(), "decay", n=3)
    assert titles_of(figure)[:2] == ("Extremes of decay (best trial, 40 entries)", "decay")
    decay = best_decay()
    order = decay.flatten().argsort(descending=True).tolist()
    expected = [f"decay[{i // 5}, {i % 5}]" for i in order[:3] + order[-3:]]
    assert row_names(figure) == expected
    found = lines_of(figure)
    assert found["Largest"] == (decay.flatten()[order[:3]].tolist(), [0, 1, 2])
    assert found["Smallest"] == (decay.flatten()[order[-3:]].tolist(), [3, 4, 5])
    assert any(name.startswith(f"Median: {float(np.median(decay)):.3g}") for name in found)
    assert is_log_x(figure)


@BOTH
def test_extremes_have_the_names_of_the_module(drawn: Any) -> None:
    study = figures.tensors()
    figure = drawn.plot_extreme_hyperparameters(study, "tree", n=2)
    tree = ohg.load_tensors(study)["tree"]
    named = {
        f"{k}[{', '.join(map(str, np.unravel_index(i, v.shape)))}]": float(v.flatten()[i])
        for k, v in tree.items()
        for i in range(v.numel())
    }
    (values, _), (low, _) = lines_of(figure)["Largest"], lines_of(figure)["Smallest"]
    assert [named[label] for label in row_names(figure)] == [*values, *low]
    assert values == sorted(named.values())[-1:-3:-1]
    assert low == sorted(named.values())[1::-1]
    assert not is_log_x(figure)


@BOTH
def test_all_entries_where_there_are_few_and_labels(drawn: Any) -> None:
    values = torch.tensor([[0.3, -1.0], [math.inf, 0.5]])
    figure = drawn.plot_extreme_hyperparameters(values, labels=["a", "b", "<c>", "d"])
    labels = row_names(figure)
    assert labels == ["d", "a", "b"]
    assert lines_of(figure)["All"][0] == [0.5, pytest.approx(0.3), -1.0]
    assert "Smallest" not in lines_of(figure)
    tree = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    figure = drawn.plot_extreme_hyperparameters(tree)
    assert row_names(figure) == ["b", "w[1]", "w[0]"]
    figure = drawn.plot_extreme_hyperparameters(tree, labels={"w": ["p", "q"], "b": ["r"]})
    assert row_names(figure) == ["r", "q", "p"]
    for wrong in (["a"], {"w": ["p", "q"]}, {"w": ["p"], "b": ["r"]}):
        with pytest.raises(ohg.HyperparameterError, match="labels="):
            drawn.plot_extreme_hyperparameters(tree, labels=wrong)
    with pytest.raises(ValueError, match="n >= 1"):
        drawn.plot_extreme_hyperparameters(tree, n=0)


def test_extremes_of_a_million_are_exact_and_small() -> None:
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    figure = vis.plot_extreme_hyperparameters(values)
    assert len(figure.to_json()) < 10_000
    ordered = values.flatten().sort().values
    found = lines_of(figure)
    assert found["Largest"][0] == ordered[-20:].flip(0).tolist()
    assert found["Smallest"][0] == ordered[:20].flip(0).tolist()
    for label, value in zip(
        row_names(figure), found["Largest"][0] + found["Smallest"][0], strict=True
    ):
        i, j = map(int, label.removeprefix("[").removesuffix("]").split(", "))
        assert float(values[i, j]) == value


# Layers


@BOTH
def test_layers_in_the_order_of_the_module(drawn: Any) -> None:
    study = figures.tensors()
    figure = drawn.plot_layers(study, "tree")
    tree = ohg.load_tensors(study, "tree", like=figures.network())
    assert row_names(figure) == [f"{k} {list(v.shape)}" for k, v in tree.items()]
    assert titles_of(figure)[0] == "Layers of tree (best trial, 29 entries)"
    boxes = [[float(v.quantile(q)) for q in (0, 0.25, 0.5, 0.75, 1)] for v in tree.values()]
    if drawn is vis:
        (trace,) = figure.data
        shown = [trace.lowerfence, trace.q1, trace.median, trace.q3, trace.upperfence]
        assert pytest.approx(np.array(boxes), rel=1e-6) == np.array(shown).T
    else:
        for bar, box in zip(figure.patches, boxes, strict=True):
            ends = (bar.get_x(), bar.get_x() + bar.get_width())
            assert ends == pytest.approx((box[1], box[3]), rel=1e-6)
        medians = figure.lines[-1].get_xdata()
        assert list(medians) == pytest.approx([box[2] for box in boxes], rel=1e-6)


@BOTH
def test_layers_of_a_decay_have_a_logarithmic_axis(drawn: Any) -> None:
    assert is_log_x(drawn.plot_layers(figures.tensors(), "decay"))
    assert is_log_x(drawn.plot_layers({"a": [1.0, 200.0], "b": [3.0]}))
    assert not is_log_x(drawn.plot_layers({"a": [1.0, 20.0], "b": [3.0]}))
    assert not is_log_x(drawn.plot_layers(figures.tensors(), "decay", log=False))
    with pytest.raises(ohg.HyperparameterError, match="not above 0"):
        drawn.plot_layers({"a": [0.0, 20.0]}, log=True)


# Sample weights


@BOTH
def test_weights_by_truth(drawn: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(500, generator=generator) > 0.3
    weights = (torch.rand(500, generator=generator) + 0.4 * truth).round(decimals=2)  # with ties
    figure = drawn.plot_sample_weights(weights, truth=truth, bins=10)
    area = roc_auc_score(truth, weights)
    title, x, y = titles_of(figure)
    assert title == f"Sample Weights (AUROC {area:.3f})"
    assert (x, y) == ("Learned weight", "Samples of each kind (%)")
    edges = np.histogram_bin_edges(weights.double(), 10)
    for name, flags in (("clean", truth), ("corrupted", ~truth)):
        label = f"{int(flags.sum())} {name}, mean {float(weights[flags].double().mean()):.3g}"
        counts = np.histogram(weights[flags].double(), edges)[0]
        if drawn is vis:
            (trace,) = [t for t in figure.data if t.name == label]
            assert list(trace.customdata) == [0, *counts, 0]
            assert list(trace.x)[1:] == pytest.approx(edges)
            assert list(trace.y)[1:-1] == pytest.approx(100 * counts / counts.sum())
        else:
            (steps,) = [p for p in figure.patches if p.get_label() == label]
            assert steps.get_data().values == pytest.approx(100 * counts / counts.sum())


def test_auroc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.random(60) > rng.random()
        weights = rng.integers(0, 8, 60) / 4
        title = vis.plot_sample_weights(weights, truth=truth).layout.title.text
        if truth.all() or not truth.any():
            assert title == "Sample Weights"
        else:
            assert title == f"Sample Weights (AUROC {roc_auc_score(truth, weights):.3f})"


@BOTH
def test_weights_of_a_study(drawn: Any) -> None:
    study = figures.runs()
    figure = drawn.plot_sample_weights(study, "bilevel/x")
    assert titles_of(figure)[:2] == ("Sample Weights", "Learned weight (bilevel/x)")
    mean = float(ohg.load_tensors(study)["bilevel"]["x"].mean())
    labels = (
        [t.name for t in figure.data]
        if drawn is vis
        else [t.get_text() for t in figure.get_legend().get_texts()]
    )
    (label,) = labels
    assert label.startswith("12 samples, mean ")
    assert float(label.split()[-1]) == pytest.approx(mean, abs=1e-12)
    assert is_log_x(drawn.plot_sample_weights(figures.tensors(), "decay"))
    with pytest.raises(ohg.HyperparameterError, match="truth= has 3 entries, and there are 12"):
        drawn.plot_sample_weights(study, "bilevel/x", [True, False, True])
    with pytest.raises(ohg.HyperparameterError, match="True or False"):
        drawn.plot_sample_weights([0.1, 0.2], truth=[1.0, 2.0])
    with pytest.raises(ValueError, match="bins >= 1"):
        drawn.plot_sample_weights([0.1, 0.2], bins=0)
    with pytest.raises(ValueError, match="names="):
        drawn.plot_sample_weights([0.1, 0.2], names="no")


# Images


def pixels_of(figure: Any) -> np.ndarray:
    if hasattr(figure, "data"):
        (trace,) = figure.data
        data = base64.b64decode(trace.source.removeprefix("data:image/png;base64,"))
        return np.array(Image.open(io.BytesIO(data)))
    (image,) = figure.images
    return np.array(image.get_array())


@BOTH
def test_images_are_the_numbers(drawn: Any) -> None:
    images = (
        torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    )
    figure = drawn.plot_images(images, columns=2, labels=["a", "b", "<c>", 4])
    pixels = pixels_of(figure).astype(float)
    low, high = float(images.min()), float(images.max())
    assert titles_of(figure)[0] == f"Images: black is {low:.3g}, white {high:.3g}"
    scale = pixels.shape[1] // (2 * 5)
    scale = next(s for s in range(scale + 2, 0, -1) if _contains(pixels, images[0], s, low, high))
    for image in images:
        assert _contains(pixels, image, scale, low, high)
    if drawn is vis:
        assert [a.text for a in figure.layout.annotations] == ["a", "b", "&lt;c&gt;", "4"]
    else:
        assert [t.get_text() for t in figure.texts] == ["a", "b", "<c>", "4"]


def _contains(pixels: np.ndarray, image: Tensor, scale: int, low: float, high: float) -> bool:
    """Whether an enlarged picture is somewhere in another one."""
    wanted = np.round(255 * (image.numpy() - low) / (high - low)).repeat(scale, 0).repeat(scale, 1)
    h, w = wanted.shape
    if h > pixels.shape[0] or w > pixels.shape[1]:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (h, w))
    rough = windows[..., ::scale, ::scale]
    places = np.argwhere((rough == wanted[::scale, ::scale]).all((-1, -2)))
    return any(np.array_equal(windows[y, x], wanted) for y, x in places)


@BOTH
def test_images_in_color_and_in_log(drawn: Any) -> None:
    color = torch.zeros(1, 3, 5, 5)
    color[0, 0] = 1.0
    pixels = pixels_of(drawn.plot_images(color))
    assert pixels.shape[-1] == 3
    assert (pixels == [255, 0, 0]).all(-1).mean() > 0.7
    color = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pixels = pixels_of(drawn.plot_images(color, columns=2)).astype(float)
    low, high = float(color.min()), float(color.max())
    for channel in range(3):
        sheet, picture = pixels[..., channel], color[1, channel]
        assert any(_contains(sheet, picture, s, low, high) for s in range(40, 0, -1))
    decay = best_decay().reshape(1, 8, 5)
    figure = drawn.plot_images(figures.tensors(), "decay")
    assert titles_of(figure)[0].startswith("decay: black is ")
    assert titles_of(figure)[0].endswith(", logarithmic")
    logs = decay.log()
    assert _contains(pixels_of(figure).astype(float), *_half(logs, pixels_of(figure)))


def _half(logs: Tensor, pixels: np.ndarray) -> tuple[Tensor, int, float, float]:
    low, high = float(logs.min()), float(logs.max())
    scale = next(
        s for s in range(120, 0, -1) if _contains(pixels.astype(float), logs[0], s, low, high)
    )
    return logs[0], scale, low, high


def test_image_shapes() -> None:
    for shape in ((6, 6), (3, 6, 6), (2, 6, 6), (2, 1, 6, 6), (2, 3, 6, 6)):
        assert pixels_of(vis.plot_images(torch.rand(*shape))).ndim == (
            3 if shape[-3:-2] == (3,) else 2
        )
    flat = torch.rand(4, 12)
    assert np.array_equal(
        pixels_of(vis.plot_images(flat, shape=(3, 4))),
        pixels_of(vis.plot_images(flat.reshape(4, 3, 4))),
    )
    for wrong in (torch.rand(7), torch.rand(2, 4, 6, 6), torch.rand(1, 1, 1, 6, 6)):
        with pytest.raises(ohg.HyperparameterError, match="none of pictures"):
            vis.plot_images(wrong)
    with pytest.raises(ohg.HyperparameterError, match="shape="):
        vis.plot_images(flat, shape=(5, 5))
    with pytest.raises(ohg.HyperparameterError, match="labels= names 1 pictures, and there are 4"):
        vis.plot_images(flat, shape=(3, 4), labels=["a"])
    with pytest.raises(ohg.HyperparameterError, match="dict of tensors"):
        vis.plot_images(figures.tensors(), "tree")
    with figures.told() as warnings:
        vis.plot_images(flat, shape=(3, 4), n=3)
    assert warnings == ["1 of 4 pictures are not drawn: n=3."]


def test_large_images_stay_in_bounds() -> None:
    figure = vis.plot_images(torch.zeros(100, 64, 64))
    assert len(figure.to_json()) < 60_000
    assert pixels_of(figure).size < 5_000_000


# Retrained values


@BOTH
def test_warm_against_retrained(drawn: Any) -> None:
    study = figures.runs()
    figure = drawn.plot_warm_against_retrained(study)
    assert titles_of(figure) == ("Warm against Retrained", "Warm value", "Retrained value")
    found = lines_of(figure)
    warm = [t.user_attrs["warm_value"] for t in study.trials]
    retrained = [t.user_attrs["retrained_value"] for t in study.trials]
    assert found["Trials"] == (warm, retrained)
    ends = [min(warm + retrained), max(warm + retrained)]
    assert found["Equal"] == (ends, ends)


@BOTH
@pytest.mark.parametrize("kind", [*figures.NOTHING, "foreign", "steps"])
def test_nothing_was_retrained(drawn: Any, kind: str) -> None:
    makers: dict[str, Callable[[], optuna.Study]] = {
        **figures.NOTHING,
        "foreign": figures.foreign,
        "steps": figures.tensors,
    }
    with figures.told() as warnings:
        assert is_empty(drawn.plot_warm_against_retrained(makers[kind]()))
    assert ["does not have any retrained values" in w for w in warnings] == [True]


# Spectra


def probe(size: float) -> ohg.CurvatureReport:
    eigenvalues = torch.tensor([-0.5, 0.1, 0.2, 3.0], dtype=torch.float64) * size

    def inner(w: Any, lam: Any, batch: Any) -> Tensor:
        return 0.5 * (eigenvalues * w["w"] ** 2).sum() + 0.0 * lam["x"]

    problem = ohg.BilevelProblem(inner, lambda w, lam, _: w["w"].sum() + lam["x"])
    one = torch.ones(4, dtype=torch.float64)
    return ohg.probe_curvature(problem, {"w": one}, {"x": torch.tensor(0.0, dtype=torch.float64)})


@BOTH
def test_spectrum_has_its_peaks_at_the_eigenvalues(drawn: Any) -> None:
    figure = drawn.plot_spectrum(probe(1.0))
    assert titles_of(figure) == (
        "Spectrum",
        "Eigenvalue of the inner Hessian",
        "Spectral density",
    )
    assert is_log(figure)
    if drawn is vis:
        (trace,) = figure.data
        x, y = np.array(trace.x), np.array(trace.y)
        assert [round(s.x0, 6) for s in figure.layout.shapes] == [3.0, -0.5]
        assert "most negative: -0.5" in {a.text for a in figure.layout.annotations}
    else:
        x, y = (np.array(v) for v in figure.lines[0].get_data())
    for eigenvalue in (-0.5, 0.1, 0.2, 3.0):
        near = np.abs(x - eigenvalue) < 0.03
        assert y[near].max() > 1000 * np.median(y) or y[near].max() > 0.1
    inside = np.diff(x) > 0
    above = y - y.min()  # the floor, below which nothing is drawn
    area = float((0.5 * (above[1:] + above[:-1]) * np.diff(x))[inside].sum())
    assert area == pytest.approx(1.0, abs=0.02)


@BOTH
def test_spectra_beside_each_other(drawn: Any) -> None:
    figure = drawn.plot_spectrum({"one": probe(1.0), "two": probe(2.0)})
    assert [n for n in lines_of(figure) if n in ("one", "two")] == ["one", "two"]
    if drawn is vis:
        assert len(figure.to_json()) < 30_000
    for wrong in (None, {}, {"one": 1.0}, torch.zeros(3)):
        with pytest.raises(TypeError, match="probe_curvature"):
            drawn.plot_spectrum(wrong)


# Costs


@BOTH
def test_costs_against_errors(drawn: Any) -> None:
    points = {"CG": [(20, 0.01), (10, 0.3)], "Neumann": [(10, 0.5), (20, 0.0), (5, math.nan)]}
    with figures.told() as warnings:
        figure = drawn.plot_cost_against_error(points, cost_name="Products")
    assert len(warnings) == 1
    assert "2 records" in warnings[0]
    assert titles_of(figure) == ("Cost against Error", "Products", "Relative error")
    found = lines_of(figure)
    assert found == {"CG": ([10, 20], [0.3, 0.01]), "Neumann": ([10], [0.5])}
    assert is_log(figure)
    assert is_log_x(figure)
    records = [
        {"method": n, "hvps": c, "off": e, "other": None} for n, p in points.items() for c, e in p
    ]
    names = {"label": "method", "cost": "hvps", "error": "off"}
    with figures.told():
        for table in (records, pd.DataFrame(records)):
            assert lines_of(drawn.plot_cost_against_error(table, **names)) == found
    with pytest.raises(ValueError, match=r"needs 'label', 'cost', 'error' in each record"):
        drawn.plot_cost_against_error(records)
    with pytest.raises(ValueError, match="pairs"):
        drawn.plot_cost_against_error({"CG": [(1, 2, 3)]})
    for nothing in ([], {}, pd.DataFrame([])):
        with figures.told() as warnings:
            assert is_empty(drawn.plot_cost_against_error(nothing))
        assert warnings == ["There are no records of costs and errors."]


# All that take a study, a trial, or values


@BOTH
@pytest.mark.parametrize("kind", [*figures.NOTHING, "foreign"])
@pytest.mark.parametrize("name", OF_A_TENSOR)
def test_studies_without_tensors(drawn: Any, name: str, kind: str) -> None:
    study = {**figures.NOTHING, "foreign": figures.foreign}[kind]()
    with figures.told() as warnings:
        figure = getattr(drawn, name)(study)
    assert is_empty(figure)
    assert titles_of(figure)[0]
    assert ["does not have any tensors" in w for w in warnings] == [True]


@BOTH
@pytest.mark.parametrize("name", OF_A_TENSOR)
def test_one_trial_and_a_trial(drawn: Any, name: str) -> None:
    study = figures.new_study()
    trial = study.ask()
    draw = getattr(drawn, name)
    study.tell(trial, figures.with_tensors(trial))
    for source, settings in ((study, {}), (trial, {}), (study.trials[0], {"study": study})):
        assert not is_empty(draw(source, "decay", **settings))
    with pytest.raises(TypeError, match="study="):
        draw(study.trials[0], "decay")
    with pytest.raises(ohg.MissingTensorError, match=r"did you mean 'decay'\?"):
        draw(study, "deca")
    with pytest.raises(ohg.HyperparameterError, match="no array of real numbers"):
        draw("decay")


@pytest.mark.parametrize("name", OF_A_TENSOR)
def test_figures_are_json(name: str) -> None:
    values = torch.tensor([[1.0, math.inf, math.nan, 0.5], [0.1, 0.2, 0.3, 0.4]])
    text = getattr(vis, name)(values).to_json()
    json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is not JSON"))


def test_a_module_is_a_dict_of_its_weights() -> None:
    net = nn.Linear(3, 2)
    named = dict(net.named_parameters())
    assert row_names(vis.plot_layers(named)) == ["weight [2, 3]", "bias [2]"]
    assert row_names(vis.plot_layers(named, "bias")) == ["bias [2]"]
    with pytest.raises(ohg.HyperparameterError, match=r"no 'bais' in what was given.*'bias'\?"):
        vis.plot_layers(named, "bais")


# Estimators side by side


def test_a_sweep_measures_errors_against_the_truth() -> None:
    case = problems.ridge()
    w = case.solution(case.outer_params)
    truth = case.truth(case.outer_params)
    estimators: dict[str, Any] = {
        "CG": [ohg.Implicit(ohg.CG(max_steps=k, rtol=0.0)) for k in (1, 3, 6)],
        "exact": ohg.Implicit(ohg.Direct()),
    }
    for given in (truth, None):
        found = vis.sweep_estimators(case.problem, w, case.outer_params, estimators, truth=given)
        assert [r["label"] for r in found] == ["CG"] * 3 + ["exact"]
        costs = [r["cost"] for r in found[:3]]
        assert costs == sorted(costs)
        for record, estimator in zip(found, [*estimators["CG"], estimators["exact"]], strict=True):
            estimate = ohg.hypergradient(
                case.problem, w, case.outer_params, estimator=estimator, throw=False
            )
            error = problems.relative_error(estimate.value, truth)
            assert record["error"] == pytest.approx(error, rel=1e-4, abs=1e-9)
            assert record["cost"] == estimate.stats["num_hvps"]
        assert found[2]["error"] < 0.1 * found[0]["error"]
    with figures.told():
        assert lines_of(vis.plot_cost_against_error(found))["CG"][0] == costs
    with figures.told() as warnings:
        some = {"unrolled": ohg.Unroll(), **estimators}
        kept = vis.sweep_estimators(case.problem, w, case.outer_params, some, truth=truth)
    assert len(kept) == 4
    assert warnings[0].startswith("unrolled: ")
    zero = {k: torch.zeros_like(v) for k, v in truth.items()}
    with pytest.raises(ohg.RequirementError, match="norm 0"):
        vis.sweep_estimators(case.problem, w, case.outer_params, estimators, truth=zero)


# Examples in docstrings


def _names(of: str) -> dict[str, Any]:
    case = problems.ridge()
    studies = {"warm": figures.runs, "weights": figures.runs, "images": figures.tensors}
    study = next((make() for word, make in studies.items() if word in of), figures.tensors())
    right = torch.arange(12) % 3 > 0
    return {
        "study": study,
        "feature_names": [f"pixel {i}" for i in range(40)],
        "labels": right,
        "true_labels": torch.ones(12, dtype=torch.bool),
        "weights": figures.TARGET,
        "problem": case.problem,
        "inner_params": case.inner_params,
        "outer_params": case.outer_params,
        "w": case.inner_params,
        "lam": case.outer_params,
    }


FUNCTIONS = [
    (module, name)
    for module in (vis, vis.matplotlib)
    for name in module.__all__
    if name.startswith(("plot_", "sweep_"))
]


@pytest.mark.parametrize(("module", "name"), FUNCTIONS)
def test_the_example_runs(module: Any, name: str, tmp_path: Any, monkeypatch: Any) -> None:
    text = inspect.getdoc(getattr(module, name)) or ""
    _, _, rest = text.partition("Example::\n\n")
    code = textwrap.dedent(rest.split("\n\nArgs:")[0])
    assert code
    code = code.replace(".show()", ".to_json()").replace('"weights"', '"bilevel/x"')
    code = code.replace('"images", shape=(8, 8), labels=range(10)', '"decay", shape=(4, 5)')
    code = code.replace('"images", shape=(8, 8)', '"decay", shape=(4, 5)')
    monkeypatch.chdir(tmp_path)
    with figures.told():
        exec(compile(code, name, "exec"), _names(name))
    assert module is vis or len(list(tmp_path.glob("*.pdf"))) == 1
