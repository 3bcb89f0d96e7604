"""Trials of a search: run, with what fails among them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial
from sklearn.exceptions import FitFailedWarning

from .._errors import ObjectiveError
from ._rows import FailedTrialError
from ._study import FAILURE, quiet, was_stopped
from ._threads import one_thread

Callback = Callable[[Study, FrozenTrial], None]


class Run:
    """Runs trials of one study.

    Args:
        study: Of the search.
        raises: Whether a trial that fails is an error.
        timeout: Seconds from now on, or ``None``.
        callbacks: After each trial.
        verbose: Whether Optuna may speak.

    Attributes:
        failures: Why trials have failed.
    """

    def __init__(
        self,
        study: Study,
        raises: bool,
        timeout: float | None,
        callbacks: Sequence[Callback] | None,
        verbose: int,
    ) -> None:
        self._study, self._raises, self._verbose = study, raises, verbose
        self._end = None if timeout is None else time.monotonic() + timeout
        self.callbacks = list(callbacks or ())
        self.failures: list[str] = []

    def optimize(
        self,
        objective: Callable[[optuna.Trial], float],
        n_trials: int,
        more_callbacks: Sequence[Callback] = (),
    ) -> bool:
        """Run so many trials. Returns whether they were cut short, by the user's callbacks or the time."""
        if n_trials <= 0:
            return False
        timeout = None if self._end is None else self._end - time.monotonic()
        if timeout is not None and timeout <= 0:
            return True
        stopped = [False]

        def look(
            study: Study, trial: FrozenTrial
        ) -> None:  # one callback: Optuna copies the trial for each
            stopped[0] = was_stopped(study)
            for callback in more_callbacks:
                callback(study, trial)

        with quiet(self._verbose), one_thread():
            self._study.optimize(
                lambda trial: self._attempted(objective, trial),
                n_trials=n_trials,
                timeout=timeout,
                callbacks=[*self.callbacks, look] if more_callbacks else self.callbacks,
                catch=() if self._raises else (FailedTrialError,),
            )
        if not more_callbacks:
            stopped[0] = was_stopped(self._study)
        return stopped[0] or (self._end is not None and time.monotonic() >= self._end)

    def _attempted(self, objective: Callable[[optuna.Trial], float], trial: optuna.Trial) -> float:
        try:
            return objective(trial)
        except (FailedTrialError, ObjectiveError) as error:
            if self._raises:
                raise
            self.failures.append(str(error))
            trial.set_user_attr(FAILURE, str(error)[:500])
            what = f"Trial {trial.number} failed, {trial.params}: {error}"
            warnings.warn(what[:500], FitFailedWarning, stacklevel=2)
            raise FailedTrialError(str(error)) from error
