"""A transformer that multiplies each feature by a weight."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.sparsefuncs import inplace_column_scale
from sklearn.utils.validation import FLOAT_DTYPES, check_array, check_is_fitted, validate_data


class FeatureWeights(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Multiply each feature by a weight.

    In front of a linear model it stands for a penalty per feature: ``Ridge(alpha)`` behind weights ``w`` fits
    ``alpha / w_j^2`` for feature ``j``, ``Lasso(alpha)`` ``alpha / w_j``, ``LogisticRegression(C)`` ``C w_j^2``. In front of
    a kernel machine, ``1 / w_j`` is a length scale per feature (automatic relevance determination). A weight of 0 takes
    a feature out. :class:`HypergradientSearchCV` finds the weights, with ``TensorDistribution("per_feature", ...)`` as the
    distribution of ``...__weights``; what it returns is a plain pipeline.

    Scale the features before (``StandardScaler``), or the weights are not comparable.

    Args:
        weights: ``(n_features,)``, finite and not negative; ``None`` for ones.

    Attributes:
        weights_: ``(n_features,)``.
        n_features_in_, feature_names_in_: As of every transformer.

    Raises:
        ValueError: from ``fit``, for weights that do not fit.

    Reference: Neal (1996), "Bayesian Learning for Neural Networks", section 1.2.3 (automatic relevance determination);
    for penalties, Hoerl & Kennard (1970), "Ridge regression", section 5 (generalized ridge regression).
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {"weights": ["array-like", None]}

    def __init__(self, weights: Any = None) -> None:
        self.weights = weights

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def fit(self, X: Any, y: Any = None) -> FeatureWeights:
        """Check the weights against the features.

        Args:
            X: ``(n_samples, n_features)``, dense or sparse.
            y: Ignored.
        """
        X = validate_data(self, X, accept_sparse=("csr", "csc"), dtype=FLOAT_DTYPES)
        if self.weights is None:
            self.weights_ = np.ones(X.shape[1])
            return self
        weights = check_array(
            self.weights, ensure_2d=False, dtype=np.float64, input_name="weights", copy=True
        )
        if weights.shape != (X.shape[1],):
            raise ValueError(
                f"weights has shape {weights.shape}, and X has {X.shape[1]} features; give one weight per feature."
            )
        if weights.min() < 0:
            raise ValueError(
                f"weights must not be negative, and the least is {weights.min():.3g}; the sign of a feature is left to the "
                f"model behind."
            )
        self.weights_ = weights
        return self

    def transform(self, X: Any) -> Any:
        """Each column times its weight; sparse where ``X`` is."""
        check_is_fitted(self)
        X = validate_data(
            self, X, accept_sparse=("csr", "csc"), dtype=FLOAT_DTYPES, reset=False, copy=True
        )
        weights = self.weights_.astype(X.dtype)
        if hasattr(X, "toarray"):
            inplace_column_scale(X, weights)
            return X
        X *= weights
        return X
