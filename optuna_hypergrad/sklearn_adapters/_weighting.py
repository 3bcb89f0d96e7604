"""Sample weights that are searched, on their way into the fits of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np


class SampleWeighting:
    """Puts the weights of a setting into what ``BaseSearchCV`` gives to ``fit``, times the user's own.

    Args:
        name: Of the weights in ``param_distributions``.
        argument: Of ``fit``.
        fit_params: The arguments of ``fit``, which are changed in place; the scores have theirs elsewhere.
    """

    def __init__(self, name: str, argument: str, fit_params: dict[str, Any]) -> None:
        self._name, self._argument, self._fit_params = name, argument, fit_params
        self._own = fit_params.get(argument)
        self._learned: list[np.ndarray] = []

    def taken_from(self, setting: dict[str, Any]) -> dict[str, Any]:
        """The setting without its weights, which the next fits will have."""
        self._learned.append(setting[self._name])
        self.put_back(len(self._learned) - 1)
        return {k: v for k, v in setting.items() if k != self._name}

    def put_back(self, index: int) -> None:
        """The weights of the setting of this row."""
        learned = self._learned[index]
        own = 1.0 if self._own is None else np.asarray(self._own)
        self._fit_params[self._argument] = own * learned

    def complete(self, results: dict[str, Any]) -> None:
        """Say in ``cv_results_`` what the weights were."""
        shown = np.ma.masked_array(np.empty(len(self._learned), dtype=object))
        for i, (setting, weights) in enumerate(zip(results["params"], self._learned, strict=True)):
            setting[self._name] = weights
            shown[i] = weights
        results[f"param_{self._name}"] = shown
