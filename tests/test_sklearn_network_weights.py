"""Networks as scikit-learn estimators: weights of samples that ``fit`` is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import optuna_hypergrad as ohg

QUICK: dict[str, Any] = {
    "hidden_layer_sizes": (8,), "max_iter": 4, "inner_steps": 3, "burn_in": 10, "num_products": 2, "learning_rate_init": 0.05,
    "random_state": 0,
}  # fmt: skip
X, Y = load_digits(return_X_y=True)
KINDS = [ohg.HypergradientClassifier, ohg.HypergradientRegressor]
WEIGHTED: list[dict[str, Any]] = [{}, {"batch_size": 16}, {"tune_sample_weights": True}]


def same(one: Any, other: Any, x: np.ndarray, rtol: float = 0.0) -> None:
    """All that two fits have found, to ``rtol`` or to the bit."""
    for name, value in one.hyperparameters_.items():
        assert other.hyperparameters_[name] == pytest.approx(value, rel=rtol, abs=0)
    assert other.validation_loss_ == pytest.approx(one.validation_loss_, rel=rtol, abs=0)
    method = "predict_proba" if isinstance(one, ohg.HypergradientClassifier) else "predict"
    pairs = zip(getattr(one, method)(x).ravel(), getattr(other, method)(x).ravel(), strict=True)
    assert all(b == pytest.approx(a, rel=rtol, abs=rtol) for a, b in pairs)


@pytest.mark.parametrize("changed", WEIGHTED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_are_none_to_the_bit(kind: Any, changed: dict[str, Any]) -> None:
    x, y = X[:80], Y[:80]
    model = kind(**{**QUICK, **changed})
    plain = clone(model).fit(x, y)
    same(plain, clone(model).fit(x, y, np.full(80, 0.3)), x)
    same(plain, clone(model).fit(x, y, sample_weight=7), x)
    other = clone(model).fit(x, y, sample_weight=1.0 + np.arange(80) % 3)
    assert not np.array_equal(other.predict(x), plain.predict(x)) or kind is KINDS[0]
    assert other.validation_loss_ != plain.validation_loss_


@pytest.mark.parametrize("changed", WEIGHTED, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_samples_without_weight_are_as_if_they_were_not_there(
    kind: Any, changed: dict[str, Any]
) -> None:
    x, y = X[:90], Y[:90]
    wrong = np.arange(90) % 9 == 4
    weights = np.where(wrong, 0.0, 0.5 + (np.arange(90) % 4))
    model = kind(**{**QUICK, **changed})
    removed = clone(model).fit(x[~wrong], y[~wrong], sample_weight=weights[~wrong])
    spoiled_x, spoiled_y = np.where(wrong[:, None], 1e3, x), np.where(wrong, 77, y)
    found = clone(model).fit(spoiled_x, spoiled_y, sample_weight=weights)
    own = found.hyperparameters_.pop("sample_weights", None)
    if own is not None:
        assert (own[wrong] == 1).all()
        assert np.array_equal(own[~wrong], removed.hyperparameters_.pop("sample_weights"))
    same(removed, found, x)
    judges = np.flatnonzero(~wrong)[removed.validation_indices_]
    assert np.array_equal(found.validation_indices_, judges)


@pytest.mark.parametrize("decay", ["one", "per_weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_numbers_of_repetitions(kind: Any, decay: str) -> None:
    """With samples of their own held back, whose weights repeat them, too; all in full batches."""
    x, y = X[:110], Y[:110]
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, 110)
    (a, b), settings = (slice(80), slice(80, 110)), {**QUICK, "decay": decay}
    model = kind(**settings, early_stopping=False, activation="tanh")
    found = clone(model).fit(
        x[a], y[a], counts[a], X_val=x[b], y_val=y[b], sample_weight_val=counts[b]
    )
    again = [np.repeat(v[s], counts[s], axis=0) for s in (a, b) for v in (x, y)]
    repeated = clone(model).fit(*again[:2], X_val=again[2], y_val=again[3])
    same(repeated, found, x, rtol=1e-8)
    unweighted = clone(model).fit(x[a], y[a], X_val=x[b], y_val=y[b])
    assert unweighted.validation_loss_ != pytest.approx(found.validation_loss_, rel=1e-3)
    assert np.array_equal(np.unique(found.validation_indices_), np.arange(30))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sample_weight": np.ones(59)}, r"sample_weight: sample_weight.shape == \(59,\), expected \(60,\)"),
        ({"sample_weight": np.ones((60, 1))}, "1D array or scalar, got 2D"),
        ({"sample_weight": np.r_[np.ones(59), -1e-3]}, "Negative values in data passed to `sample_weight`"),
        ({"sample_weight": np.r_[np.ones(59), np.nan]}, "contains NaN"),
        ({"sample_weight": np.zeros(60)}, "at least one non-zero"),
        ({"sample_weight": np.eye(60)[0]}, "zero but for 1 sample"),
        ({"sample_weight": Y[:60] == 0}, "one class"),
        ({"sample_weight_val": np.ones(3)}, "sample_weight_val is of X_val"),
        ({"X_val": np.ones((2, 64)), "y_val": [0, 1], "sample_weight_val": [1.0]}, r"sample_weight_val: .*\(1,\), expected"),
        ({"X_val": np.ones((2, 64)), "y_val": [0, 1], "sample_weight_val": [0.0, 0.0]}, "sample_weight_val: .*non-zero"),
    ],
    ids=lambda v: None,
)  # fmt: skip
def test_weights_that_are_none_are_refused(given: dict[str, Any], message: str) -> None:
    x, y = X[:60], Y[:60]
    with pytest.raises(ValueError, match=message):
        ohg.HypergradientClassifier(**QUICK).fit(x, y, **given)


def test_classes_are_those_of_y_whatever_the_type_of_what_is_held_back() -> None:
    x, y = X[:60], Y[:60]
    model = ohg.HypergradientClassifier(**QUICK)
    expected = clone(model).fit(x, y, X_val=x, y_val=y)
    found = clone(model).fit(x, y, X_val=x, y_val=y.astype(float))
    assert found.classes_.dtype == y.dtype
    assert np.array_equal(found.predict_proba(x), expected.predict_proba(x))
    named = np.array(["a", "bc"])[(y > 4).astype(int)]
    wide = clone(model).fit(x, named, X_val=x, y_val=named.astype(object))
    assert wide.classes_.dtype == named.dtype
    with pytest.raises(ValueError, match="Mix of label input types"):
        clone(model).fit(x, y, X_val=x, y_val=y.astype(str))


def test_weights_are_routed() -> None:
    x, y = X[:80], Y[:80]
    weights = 1.0 + np.arange(80) % 3
    model = ohg.HypergradientRegressor(**QUICK)
    with sklearn.config_context(enable_metadata_routing=True):
        asking = clone(model).set_fit_request(sample_weight=True)
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        found = make_pipeline(scaler, asking).fit(x, y, sample_weight=weights)
        silent = clone(model).set_fit_request(sample_weight=False)
        without = make_pipeline(StandardScaler(), silent).fit(x, y)
    expected = clone(model).fit(StandardScaler().fit_transform(x), y, sample_weight=weights)
    assert np.array_equal(found.predict(x), expected.predict(StandardScaler().fit_transform(x)))
    assert not np.array_equal(found.predict(x), without.predict(x))
    assert found.score(x, y, sample_weight=weights) != found.score(x, y)
