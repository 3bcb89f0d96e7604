"""Networks as scikit-learn estimators, of which the regularization is tuned while they train."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor
from torch.nn.functional import cross_entropy

from ._network_estimator import AbstractNetwork


class HypergradientClassifier(ClassifierMixin, AbstractNetwork):  # type: ignore[misc]
    """Classification by a network whose decays, and weights of samples, are tuned by hypergradients while it trains.

    Part of the samples are held back. Training and the hyperparameters move in turns, the latter along the hypergradient of
    the loss on those samples (implicit differentiation with the Gauss-Newton matrix): first one decay for all, then each on
    its own. Then the network is trained from the beginning, on all samples, with what was found: ``score`` is of that one.

    References: Lorraine, Vicol & Duvenaud (2020), "Optimizing millions of hyperparameters by implicit differentiation"; for
    weights of samples, Ren et al. (2018), "Learning to reweight examples for robust deep learning".

    Args:
        module: A function ``(n_inputs, n_outputs) -> torch.nn.Module`` (initialized by ``random_state``), or a module, whose
            weights are where training starts; from inputs ``(n, n_inputs)`` to logits ``(n, n_classes)``. ``None``: a
            perceptron with ``hidden_layer_sizes`` (or one size) and ``activation`` ("relu", "tanh" or "gelu"). No batch normalization and
            no dropout.
        decay: What has a decay of its own: ``"one"`` (all weight matrices together), ``"per_layer"`` (each matrix),
            ``"per_tensor"`` (biases, too) or ``"per_weight"`` (each number).
        tune_sample_weights: A weight in [0, 1] for each training sample, tuned as well: for wrong labels and outliers.
        decay_init, decay_range: Where decays start, all the same, and their bounds. With ``early_stopping`` one decay is tuned
            from there and from a hundred times as much, and what is held back chooses.
        validation_fraction: Of the samples, what is held back; of each class alike.
        max_iter: Outer steps at most, one of Adam each (``outer_learning_rate``, in the logarithms of decays): so many with
            one decay, and, where there are more hyperparameters, so many with all.
        inner_steps, burn_in: Steps of training (Adam, ``learning_rate_init``) between outer steps, and before the first.
        num_products: Products with the curvature per hypergradient.
        early_stopping: It ends after ``n_iter_no_change`` outer steps without a smaller loss of what is held back, and what had the
            smallest one is taken. Where there are fewer than five samples held back for each hyperparameter, half of them
            guides the hyperparameters and the other half judges, so that many are used only where that generalizes; otherwise,
            and without early stopping, all of them do both.
        batch_size: Samples per step of training; ``None`` for all.
        standardize: Inputs to mean 0 and variance 1.
        dtype: Of the computation: "float32", "float64", or "auto", which is the former on a GPU.
        device: A torch device; "auto" is a GPU if there is one.
        random_state: Of initial weights, split and batches.

    Attributes:
        module_: The module, with the weights of the training on all samples.
        hyperparameters_: Arrays: decays by the name of their tensor (``"decay"`` where there is one), and ``sample_weights``
            ``(n_samples,)``, 1 for those held back; training multiplies them by those that ``fit`` is given.
        validation_loss_: The mean cross entropy, weighted as ``fit`` says, on the samples that judge, of a network trained from the beginning on those
            that were not held back, with these hyperparameters: cold, where those of ``history_`` are warm. Those samples have chosen
            when to end, and a few hyperparameters: for an estimate that nothing was fitted to, use others.
        validation_indices_: Of the samples that judge, in ``X``, or in ``X_val`` where that was given.
        history_: For each outer step, a dict with ``outer_value`` (of the samples that guide) and ``hypergradient_norm``.
        n_iter_, n_training_steps_: Outer steps, and steps of the training of ``module_``.
        classes_: In the order of ``predict_proba``.
        n_features_in_, feature_names_in_: As everywhere.
    """

    _classes: ClassVar[bool] = True

    def _targets(self, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} cannot tell apart one class: y holds {self.classes_[0]} only, as far as samples have a "
                f"weight."
            )
        return np.asarray(labels)

    def _num_outputs(self) -> int:
        return len(self.classes_)

    def _scaled(self, loss: float) -> float:
        return loss

    @staticmethod
    def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, reduction="none")

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities ``(n_samples, n_classes)``, in the order of ``classes_``."""
        return np.asarray(torch.softmax(self._outputs(X), 1))

    def predict(self, X: Any) -> np.ndarray:
        """Classes ``(n_samples,)``."""
        places = self._outputs(X).argmax(1).numpy()
        return np.asarray(self.classes_[places])


class HypergradientRegressor(RegressorMixin, AbstractNetwork):  # type: ignore[misc]
    """Regression by a network whose decays, and weights of samples, are tuned by hypergradients while it trains.

    As :class:`HypergradientClassifier`, in all arguments and attributes, but: the loss is the squared error; the module gives
    ``(n, 1)``, and is trained on targets of mean 0 and variance 1; ``validation_loss_`` is in the units of ``y``, squared.

    Reference: Lorraine, Vicol & Duvenaud (2020), "Optimizing millions of hyperparameters by implicit differentiation".
    """

    _classes: ClassVar[bool] = False

    def _targets(self, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
        y = y.astype(np.float64)
        self._mean = float((weights * y).mean())
        self._deviation = float(np.sqrt((weights * (y - self._mean) ** 2).mean())) or 1.0
        return (y - self._mean) / self._deviation

    def _num_outputs(self) -> int:
        return 1

    def _scaled(self, loss: float) -> float:
        return loss * self._deviation**2

    @staticmethod
    def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs[:, 0] - targets).square()

    def predict(self, X: Any) -> np.ndarray:
        """Values ``(n_samples,)``."""
        scaled = self._outputs(X)[:, 0].numpy()
        return np.asarray(scaled * self._deviation + self._mean)
