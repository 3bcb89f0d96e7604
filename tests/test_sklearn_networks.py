"""Networks as scikit-learn estimators: conventions, hypergradients, and what their tuning is good for."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, make_classification
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

import optuna_hypergrad as ohg
from optuna_hypergrad.closed_form import ridge
from optuna_hypergrad.sklearn_adapters._network_problem import Network, build, split
from optuna_hypergrad.sklearn_adapters._network_training import Schedule, train_anew

QUICK: dict[str, Any] = {
    "hidden_layer_sizes": (8,), "max_iter": 5, "inner_steps": 5, "burn_in": 20, "num_products": 3, "learning_rate_init": 0.05,
    "random_state": 0,
}  # fmt: skip
DIGITS = load_digits(return_X_y=True)
SPLIT_BY_ROWS = {
    "check_sample_weight_equivalence_on_dense_data": "other rows are held back where there are more; as for SGDClassifier"
}


def some_digits(n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    return DIGITS[0][:n], DIGITS[1][:n]


@pytest.mark.parametrize("kind", [ohg.HypergradientClassifier, ohg.HypergradientRegressor])
def test_scikit_learns_checks(kind: Any) -> None:
    estimator = kind(
        hidden_layer_sizes=(8,), decay="one", max_iter=1, inner_steps=2, burn_in=40, learning_rate_init=0.05, num_products=2
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(
            estimator, on_fail=None, on_skip=None, expected_failed_checks=SPLIT_BY_ROWS
        )
    assert [(r["check_name"], r["exception"]) for r in results if r["status"] == "failed"] == []
    assert sum(r["status"] == "passed" for r in results) > 50
    weighted = [r["check_name"] for r in results if "sample_weight" in r["check_name"]]
    assert len(weighted) >= 7
    assert [r["check_name"] for r in results if r["status"] == "xfail"] == list(SPLIT_BY_ROWS)


@pytest.mark.parametrize("decay", ["one", "per_layer", "per_tensor", "per_weight"])
def test_the_hypergradient_of_each_decay_is_the_closed_form_of_a_linear_network(decay: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((40, 5), (40,)))
    counts = torch.linspace(0.2, 1.8, 40, dtype=torch.float64)
    train = x[:30], y[:30], torch.arange(30), counts[:30]
    held = x[30:], y[30:], torch.arange(10), counts[30:]
    module = build(lambda a, b: nn.Linear(a, b, bias=False), (), "relu", 5, 1, seed=0).double()
    network = Network(module, ohg.HypergradientRegressor._loss, decay)
    lam = network.start(0.05, num_samples=30)
    lam["sample_weights"] = 0.2 + 0.8 * torch.rand(30, generator=generator, dtype=torch.float64)
    found = ohg.hypergradient(
        network.problem(train, held, None, seed=0),
        network.weights(),
        lam,
        estimator=ohg.Implicit(ohg.CG(rtol=1e-12)),
        inner_solver=ohg.NewtonCG(rtol=1e-12, atol=1e-13),
    )
    leaves = {k: v.clone().requires_grad_(True) for k, v in lam.items()}
    name = "decay" if decay == "one" else "weight"
    # mean of c s r^2 + d w^2 / 2, in units of the sum that ridge takes
    penalty = leaves[name].reshape(-1) * 30 / 2
    model = ridge(x[:30], y[:30], penalty, sample_weight=counts[:30] * leaves["sample_weights"])
    loss = (counts[30:] * (model.predict(x[30:]) - y[30:]).square()).mean()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for key, slope in zip(leaves, expected, strict=True):
        assert torch.allclose(found.value[key], slope, rtol=1e-7, atol=1e-10)
    assert float(found.outer_value) == pytest.approx(float(loss.detach()), rel=1e-8)


def test_what_has_a_decay() -> None:
    x, y = some_digits(60)
    shapes = {}
    for decay in ("one", "per_layer", "per_tensor", "per_weight"):
        model = ohg.HypergradientClassifier(decay=decay, tune_sample_weights=True, **QUICK).fit(
            x, y
        )
        shapes[decay] = {k: v.shape for k, v in model.hyperparameters_.items()}
        assert shapes[decay].pop("sample_weights") == (60,)
    matrices, biases = {"0.weight": (8, 64), "2.weight": (10, 8)}, {"0.bias": (8,), "2.bias": (10,)}
    assert shapes["one"] == {"decay": ()}
    assert shapes["per_layer"] == dict.fromkeys(matrices, ())
    assert shapes["per_tensor"] == dict.fromkeys({**matrices, **biases}, ())
    assert shapes["per_weight"] == {**matrices, **biases}


def test_hyperparameters_move_and_help() -> None:
    """From a decay that is far too small: the loss on new data is less than without tuning."""
    x, y = load_diabetes(return_X_y=True)
    settings: dict[str, Any] = {
        "random_state": 0, "decay": "one", "decay_init": 1e-6, "early_stopping": False, "max_iter": 40, "learning_rate_init": 0.03
    }  # fmt: skip
    tuned = ohg.HypergradientRegressor(outer_learning_rate=0.5, **settings)
    plain = ohg.HypergradientRegressor(decay_range=(1e-6, 1e-6), **settings)
    scores = [m.fit(x[:150], y[:150]).score(x[150:], y[150:]) for m in (tuned, plain)]
    assert scores[0] > scores[1] + 0.1
    assert tuned.hyperparameters_["decay"] > 1e-3
    assert plain.hyperparameters_["decay"] == 1e-6


def test_wrong_labels_get_small_weights_from_data_that_can_be_trusted() -> None:
    x, y = make_classification(
        1200, 10, n_informative=6, n_clusters_per_class=1, class_sep=1.5, random_state=0
    )
    rng = np.random.default_rng(0)
    wrong = rng.random(300) < 0.25
    clean = {"X_val": x[300:450], "y_val": y[300:450]}
    settings: dict[str, Any] = {
        "hidden_layer_sizes": (),
        "decay": "one",
        "max_iter": 20,
        "outer_learning_rate": 0.3,
        "random_state": 0,
    }
    tuned, plain = (
        ohg.HypergradientClassifier(tune_sample_weights=t, **settings).fit(x[:300], y[:300] ^ wrong, **clean)
        for t in (True, False)
    )  # fmt: skip
    weights = tuned.hyperparameters_["sample_weights"]
    assert weights.shape == (300,)
    assert roc_auc_score(~wrong, weights) > 0.9
    losses = [log_loss(y[450:], m.predict_proba(x[450:])) for m in (tuned, plain)]
    assert losses[0] < 0.8 * losses[1]
    assert 0 <= tuned.validation_indices_.min() <= tuned.validation_indices_.max() < 150


def test_what_is_held_back_must_fit() -> None:
    x, y = some_digits(60)
    model = ohg.HypergradientClassifier(**QUICK)
    with pytest.raises(ValueError, match="go together"):
        model.fit(x, y, X_val=x)
    with pytest.raises(ValueError, match="a class that y does not hold"):
        model.fit(x, y, X_val=x[:1], y_val=[77])
    with pytest.raises(ValueError, match="63 features"):
        model.fit(x, y, X_val=x[:, 1:], y_val=y)


def test_many_hyperparameters_are_used_only_where_the_judge_sees_a_gain() -> None:
    x, y = load_diabetes(return_X_y=True)
    lost = []
    for seed in range(3):
        one, many = (
            ohg.HypergradientRegressor(
                hidden_layer_sizes=(16,), decay=d, random_state=seed, max_iter=20, learning_rate_init=0.03
            ).fit(x[:150], y[:150])
            for d in ("one", "per_weight")
        )  # fmt: skip
        assert many.n_iter_ > one.n_iter_
        lost.append(one.score(x[150:], y[150:]) - many.score(x[150:], y[150:]))
    assert np.median(lost) < 0.05


def test_where_samples_are_few_a_strong_decay_is_tried_too() -> None:
    """From the usual one, 80 samples with 150 features are fitted before it has grown."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1080, 150))
    y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * rng.normal(size=1080)
    model = ohg.HypergradientRegressor(hidden_layer_sizes=(32,), decay="one", random_state=0)
    error = np.mean((model.fit(x[:80], y[:80]).predict(x[80:]) - y[80:]) ** 2)
    assert float(model.hyperparameters_["decay"]) > 0.3
    assert error < 1.1 * np.var(y[80:])


@pytest.mark.parametrize(("decay", "few"), [("per_layer", True), ("per_weight", False)])
def test_those_that_judge_many_are_not_those_that_guide(decay: str, few: bool) -> None:
    x, y = some_digits()

    def judges(early_stopping: bool) -> set[int]:
        model = ohg.HypergradientClassifier(decay=decay, early_stopping=early_stopping, **QUICK)
        return set(model.fit(x, y).validation_indices_)

    both, judge = judges(False), judges(True)
    if few:  # two, and five samples are enough for each
        assert judge == both
    else:
        assert judge < both
        assert len(judge) == pytest.approx(len(both) / 2, abs=5)


def test_the_network_is_one_that_was_trained_anew_on_all_samples() -> None:
    x, y = some_digits()
    model = ohg.HypergradientClassifier(**QUICK).fit(x, y)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    module = build(None, (8,), "relu", 64, 10, seed).double()
    network = Network(module, model._loss, "per_layer")
    lam = {k: torch.as_tensor(v) for k, v in model.hyperparameters_.items()}
    inputs = torch.as_tensor(StandardScaler().fit_transform(x))
    data = inputs, torch.as_tensor(y), torch.arange(120), torch.ones(120, dtype=torch.float64)
    schedule = Schedule(5, 5, 20, 0.05, 0.1, 3, None, None)
    weights = train_anew(network, data, lam, schedule, model.n_training_steps_, seed)
    for name, value in model.module_.state_dict().items():
        assert torch.allclose(value, weights[name])
    assert log_loss(y, model.predict_proba(x)) < log_loss(y, np.full((120, 10), 0.1))


@pytest.mark.parametrize(
    "changed",
    [{}, {"batch_size": 32}, {"dtype": "float32"}, {"early_stopping": False}, {"decay": "per_weight"}],
    ids=str,
)  # fmt: skip
def test_fits_are_the_same_again_pickled_and_in_single_precision(changed: dict[str, Any]) -> None:
    x, y = some_digits()
    model = ohg.HypergradientClassifier(**{**QUICK, **changed})
    first = model.fit(x, y).predict_proba(x)
    assert np.array_equal(clone(model).fit(x, y).predict_proba(x), first)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict_proba(x), first)
    assert np.array_equal(model.fit(x.astype(np.float32), y).predict_proba(x), first)
    assert first.sum(1) == pytest.approx(1.0)
    other = model.set_params(random_state=1).fit(x, y).predict_proba(x)
    assert not np.array_equal(other, first)


def convolutional(num_inputs: int, num_outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_outputs)
    )  # fmt: skip


def test_modules_of_ones_own_in_pipelines() -> None:
    x, y = some_digits()
    model = ohg.HypergradientClassifier(convolutional, **{**QUICK, "decay": "per_tensor"})
    assert cross_val_score(make_pipeline(StandardScaler(), model), x, y, cv=2).mean() > 0.6
    with torch.random.fork_rng():
        given = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    before = {k: v.clone() for k, v in given.state_dict().items()}
    state = torch.random.get_rng_state()
    fitted = ohg.HypergradientClassifier(given, **QUICK).fit(x, y)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items())
    assert fitted.score(x, y) > 0.8


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"module": lambda a, b: nn.Sequential(nn.Linear(a, b), nn.Dropout())}, ValueError, "Dropout layer.*decays"),
        ({"module": lambda a, b: nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b))}, ValueError, "LayerNorm"),
        ({"module": lambda a, b: nn.Linear(a, b + 1)}, ValueError, r"gives \(2, 11\).*must give \(2, 10\)"),
        ({"module": lambda a, b: nn.ReLU()}, ValueError, "no parameters"),
        ({"module": lambda a, b: 3}, TypeError, "gave int, no torch module"),
        ({"decay_range": (2e-2, 1.0)}, ValueError, "low <= decay_init"),
        ({"decay_range": (0.0, 1.0)}, ValueError, "0 < low"),
        ({"hidden_layer_sizes": (0,)}, ValueError, "integers from 1 on"),
        ({"hidden_layer_sizes": 0}, ValueError, r"'hidden_layer_sizes' .* in the range \[1, inf\)"),
        ({"module": nn.Linear(3, 10)}, ValueError, r"inputs of shape \(2, 64\).* cannot be multiplied"),
        ({"decay": "per_unit"}, ValueError, "'decay' parameter"),
        ({"device": "cudaa"}, ValueError, "device='cudaa' cannot be used here"),
        ({"learning_rate_init": 1e200}, ohg.SolverError, "."),
    ],
    ids=lambda v: None if not isinstance(v, dict) else next(iter(v)),
)  # fmt: skip
def test_what_cannot_be_used_is_refused(settings: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ohg.HypergradientClassifier(**{**QUICK, **settings}).fit(*some_digits(60))


def test_one_hidden_layer_may_be_a_number() -> None:
    x, y = some_digits(60)
    one = ohg.HypergradientClassifier(**{**QUICK, "hidden_layer_sizes": 8}).fit(x, y)
    same = ohg.HypergradientClassifier(**{**QUICK, "hidden_layer_sizes": (8,)}).fit(x, y)
    np.testing.assert_array_equal(one.predict_proba(x), same.predict_proba(x))


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="one class"):
        ohg.HypergradientClassifier(**QUICK).fit(np.eye(4), ["a"] * 4)


@pytest.mark.parametrize("counts", [(50, 50), (3, 40), (1, 1, 1), (1, 30), (2,)])
def test_splits_leave_each_class_in_the_training(counts: tuple[int, ...]) -> None:
    y = np.repeat(np.arange(len(counts)), counts)
    inside, held = split(y, 0.2, True, seed=0)
    assert sorted([*inside, *held]) == list(range(len(y)))
    assert len(held) >= 1
    if max(counts) > 1:
        assert set(y[inside]) == set(range(len(counts)))
    if min(counts) >= 5:
        assert np.bincount(y[held]) == pytest.approx(0.2 * np.array(counts), abs=1)


def test_a_search_tunes_the_rest() -> None:
    x, y = make_classification(150, random_state=0)
    search = ohg.HypergradientSearchCV(
        ohg.HypergradientClassifier(**QUICK), {"activation": ["relu", "tanh"]}, n_trials=3, cv=2, random_state=0
    ).fit(x, y)  # fmt: skip
    assert search.score(x, y) > 0.7
