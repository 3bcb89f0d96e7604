"""What networks that are scikit-learn estimators share: settings, and the two trainings of a fit."""

from __future__ import annotations

import abc
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, _fit_context
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions
from sklearn.utils.multiclass import unique_labels
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from ._counted import counted, relative
from ._network_problem import ACTIVATIONS, SAMPLES, Data, Network, build, split
from ._network_training import Schedule, train_anew, tune

_SAMPLES_EACH = 5
"""Held-back samples for each hyperparameter, with which they are too few to fit the samples that they are judged by."""


class AbstractNetwork(BaseEstimator, abc.ABC):  # type: ignore[misc]
    """A network whose regularization is tuned while it trains."""

    _classes: ClassVar[bool]
    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "module": [callable, HasMethods("named_parameters"), None],
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "decay": [StrOptions({"one", "per_layer", "per_tensor", "per_weight"})],
        "tune_sample_weights": ["boolean"],
        "decay_init": [Interval(Real, 0, None, closed="neither")],
        "decay_range": [tuple, list],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "inner_steps": [Interval(Integral, 1, None, closed="left")],
        "burn_in": [Interval(Integral, 0, None, closed="left")],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "outer_learning_rate": [Interval(Real, 0, None, closed="neither")],
        "num_products": [Interval(Integral, 1, None, closed="left")],
        "early_stopping": ["boolean"],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "standardize": ["boolean"],
        "dtype": [StrOptions({"auto", "float32", "float64"})],
        "device": [str, torch.device],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        module: Any = None,
        *,
        hidden_layer_sizes: Any = (64,),
        activation: str = "relu",
        decay: Literal["one", "per_layer", "per_tensor", "per_weight"] = "per_layer",
        tune_sample_weights: bool = False,
        decay_init: float = 1e-2,
        decay_range: tuple[float, float] = (1e-7, 10.0),
        validation_fraction: float = 0.2,
        max_iter: int = 100,
        inner_steps: int = 10,
        burn_in: int = 50,
        learning_rate_init: float = 0.01,
        outer_learning_rate: float = 0.1,
        num_products: int = 10,
        early_stopping: bool = True,
        n_iter_no_change: int = 30,
        batch_size: int | None = None,
        standardize: bool = True,
        dtype: str = "auto",
        device: Any = "auto",
        random_state: Any = None,
    ) -> None:
        self.module = module
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.decay = decay
        self.tune_sample_weights = tune_sample_weights
        self.decay_init = decay_init
        self.decay_range = decay_range
        self.validation_fraction = validation_fraction
        self.max_iter = max_iter
        self.inner_steps = inner_steps
        self.burn_in = burn_in
        self.learning_rate_init = learning_rate_init
        self.outer_learning_rate = outer_learning_rate
        self.num_products = num_products
        self.early_stopping = early_stopping
        self.n_iter_no_change = n_iter_no_change
        self.batch_size = batch_size
        self.standardize = standardize
        self.dtype = dtype
        self.device = device
        self.random_state = random_state

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Any:
        """Tune, then train on all samples from the beginning with what was found.

        Args:
            X: ``(n_samples, n_features)``.
            y: ``(n_samples,)``.
            sample_weight: ``(n_samples,)``, how often each sample counts: in training (times a weight that is tuned), in what
                guides and judges, and in the means by which inputs and targets are scaled. One of weight 0 counts as little as
                one that is not there. (Which samples are held back, and which are drawn for a batch, does not depend on weights. So
                a sample of weight 2 is the same as one that is there twice only with ``batch_size=None``, ``X_val`` and
                ``early_stopping=False``; otherwise another random split may tell them apart.)
            X_val, y_val: What is held back, in place of a fraction of ``X``: data to be trusted, where weights of samples are
                tuned.
            sample_weight_val: ``(n_val,)``, of ``X_val``, in the same units as ``sample_weight``; 1 by default.

        Raises:
            ValueError: for data or settings that cannot be used, before any work.
            SolverError: if training diverges.
        """
        low, high = self._decay_range()
        if (X_val is None) != (y_val is None):
            raise ValueError("X_val and y_val go together: one of them is None.")
        if X_val is None and sample_weight_val is not None:
            raise ValueError("sample_weight_val is of X_val, which is None.")
        least = 2 if X_val is None else 1
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=least)
        y, num_given = column_or_1d(y, warn=True), len(y)
        places, weights = counted(sample_weight, X, "sample_weight")
        if len(places) < least:
            raise ValueError(
                f"sample_weight is zero but for {len(places)} sample, and some are to be held back."
            )
        X, y, num_own = X[places], y[places], len(places)
        held_places = places
        if X_val is not None:
            X_val, y_val = validate_data(self, X_val, y_val, dtype=np.float64, reset=False)
            held_places, more = counted(sample_weight_val, X_val, "sample_weight_val")
            X_val, y_val = X_val[held_places], column_or_1d(y_val)[held_places]
            if self._classes:
                y_val = _alike(y_val, y)
            X, y = np.concatenate([X, X_val]), np.concatenate([y, y_val])
            weights = np.concatenate([weights, more])
        y = self._targets(y, relative(weights))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        device, dtype = self._device(), self._dtype()
        unequal = relative(weights) if np.ptp(weights) > 0 else None
        self._scaler = StandardScaler().fit(X, sample_weight=unequal) if self.standardize else None
        x = self._inputs(X)
        targets = torch.as_tensor(y, device=device)
        if not self._classes:
            targets = targets.to(dtype)
        module = build(
            self.module,
            tuple(np.atleast_1d(self.hidden_layer_sizes).tolist()),
            self.activation,
            X.shape[1],
            self._num_outputs(),
            seed,
        ).to(device=device, dtype=dtype)
        network = Network(module, self._loss, self.decay)
        self._check_outputs(network, x)
        if X_val is None:
            inside, held = split(y, self.validation_fraction, self._classes, seed)
        else:
            inside, held = np.arange(num_own), np.arange(num_own, len(y))
        guide, judge = held, held
        num_samples = len(inside) if self.tune_sample_weights else None
        count = sum(v.numel() for v in network.start(self.decay_init, num_samples).values())
        if self.early_stopping and len(held) > 1 and count * _SAMPLES_EACH > len(held):
            first, second = split(y[held], 0.5, self._classes, seed)
            guide, judge = held[first], held[second]

        def part(rows: np.ndarray) -> Data:
            chosen = torch.as_tensor(rows, device=device)
            count = torch.as_tensor(relative(weights[rows]), dtype=dtype, device=device)
            return x[chosen], targets[chosen], torch.arange(len(rows), device=device), count

        train, everything = part(inside), part(np.arange(len(y)))
        schedule = Schedule(
            self.max_iter,
            self.inner_steps,
            self.burn_in,
            self.learning_rate_init,
            self.outer_learning_rate,
            self.num_products,
            self.n_iter_no_change if self.early_stopping else None,
            self.batch_size,
        )
        tuned = tune(
            network,
            (train, part(guide), part(judge), part(held)),
            self.decay_init,
            (low, high),
            self.tune_sample_weights,
            schedule,
            seed,
        )
        steps, lam = tuned.num_training_steps, dict(tuned.lam)
        again = train_anew(network, train, lam, schedule, steps, seed)
        loss = network.validation_loss(again, lam, part(judge))
        self.validation_loss_ = self._scaled(float(loss.detach()))
        if SAMPLES in lam:
            tuned_weights = torch.ones(len(y), dtype=dtype, device=device)
            tuned_weights[torch.as_tensor(inside, device=device)] = lam[SAMPLES]
            lam[SAMPLES] = tuned_weights
        final = train_anew(network, everything, lam, schedule, steps, seed)
        module.load_state_dict({**module.state_dict(), **final})
        self.module_ = module.cpu()
        if SAMPLES in lam:
            own = torch.ones(num_given, dtype=dtype, device=device)
            own[torch.as_tensor(places, device=device)] = lam[SAMPLES][:num_own]
            lam[SAMPLES] = own
        self.hyperparameters_ = {k: v.cpu().numpy() for k, v in lam.items()}
        self.history_, self.n_iter_ = tuned.history, len(tuned.history)
        self.n_training_steps_ = steps
        self.validation_indices_ = held_places[judge if X_val is None else judge - num_own]
        return self

    def _decay_range(self) -> tuple[float, float]:
        try:
            low, high = map(float, self.decay_range)
        except (TypeError, ValueError):
            low, high = 0.0, 0.0
        if not 0 < low <= self.decay_init <= high < np.inf:
            raise ValueError(
                f"decay_range must be (low, high) with 0 < low <= decay_init <= high, got {self.decay_range!r:.80} and "
                f"decay_init={self.decay_init!r:.40}; give a decay_init inside the range."
            )
        return low, high

    def _device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
            raise ValueError(
                f"device={self.device!r:.60} cannot be used here; try device='auto'. Torch says: {error!s:.200}"
            ) from error
        return device

    def _dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.float64 if self._device().type == "cpu" else torch.float32
        return torch.float32 if self.dtype == "float32" else torch.float64

    def _inputs(self, X: np.ndarray) -> Tensor:
        scaled = X.copy() if self._scaler is None else self._scaler.transform(X)
        return torch.as_tensor(scaled, dtype=self._dtype(), device=self._device())

    def _check_outputs(self, network: Network, x: Tensor) -> None:
        rows = x[:2]
        try:
            with torch.no_grad():
                found = network.module(rows)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"module fails for inputs of shape {tuple(rows.shape)}, two samples of X; a function "
                f"(n_inputs, n_outputs) -> module can fit it to them. Torch says: {error!s:.200}"
            ) from error
        wanted = (len(rows), self._num_outputs())
        if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"module gives {shape} for inputs of shape {tuple(rows.shape)}; it must give {wanted}."
            )

    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self, "module_")
        X = validate_data(self, X, dtype=np.float64, reset=False)
        x = self._inputs(X)
        module = self.module_
        kept = (*module.named_parameters(), *module.named_buffers())
        state = {k: v.to(x.device) for k, v in kept}
        with torch.no_grad():
            found: Tensor = torch.func.functional_call(module, state, (x,))
        return found.double().cpu()

    @abc.abstractmethod
    def _targets(self, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """For the loss, ``(n,)``, of samples that count so much, 1 on average; what is needed to predict is kept."""

    @abc.abstractmethod
    def _num_outputs(self) -> int:
        """Of the module."""

    @abc.abstractmethod
    def _scaled(self, loss: float) -> float:
        """The mean loss in the units of ``y``."""

    @staticmethod
    @abc.abstractmethod
    def _loss(outputs: Tensor, targets: Tensor) -> Tensor:
        """``(n, k), (n,) -> (n,)``."""


def _alike(y_val: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Labels ``y_val`` as those of ``y``, of its dtype: what is predicted is what was given as ``y``.

    Raises:
        ValueError: if some are none of ``y``, or strings where those are numbers.
    """
    unique_labels(y, y_val)
    if not np.isin(y_val, y).all():
        raise ValueError("y_val holds a class that y does not hold.")
    return y_val.astype(y.dtype)
