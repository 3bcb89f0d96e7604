"""scikit-learn's own tests of its search classes, run on searches of ours that are given the same points (``sklearn_shim``).

They are those of the installed scikit-learn, with two names swapped, less the ones that cannot apply, each for its reason. With
scikit-learn 1.9.1: 119 pass, 22 do not apply, and scikit-learn itself skips 30 (array API and the like).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import sklearn
import sklearn_shim

_GRIDS = "lists of grids, in which a parameter may be missing: our space is one dict, and each trial has all of it"
_ONE_SCORE = "several scores and none named by refit: a study follows one, and the search asks for its name before any fit"
_NO_ROW = (
    "a setting of which every fit fails is a failed trial with a warning of its own, and has no row"
)
CANNOT_APPLY = {
    "test_custom_run_search": "compares all keys of cv_results_: ours have trial_number, too",
    "test_predict_proba_disabled": "searches an empty grid: an empty space is an error here",
    "test_search_cv_using_minimal_compatible_estimator": "misspells a parameter, which here is an error (nobody else checks it)",
    "test_searchcv_raise_warning_with_non_finite_score": "counts warnings: ours come with each trial",
    "test_refit_callable_multi_metric": _ONE_SCORE,
    "test_grid_search_cv_results_multimetric": _ONE_SCORE,
    "test_random_search_cv_results_multimetric": _ONE_SCORE,
    "test_unsupported_sample_weight_scorer": _ONE_SCORE,
    "test_grid_search_cv_results": _GRIDS,
    "test_random_search_cv_results": _GRIDS,
    "test_search_cv_timing": _NO_ROW,
    "test_grid_search_failing_classifier": _NO_ROW,
    "test_grid_search_classifier_all_fits_fail": _NO_ROW,
    "test_callable_multimetric_error_failing_clf": _NO_ROW,
    "test_callable_multimetric_clf_all_fits_fail": _NO_ROW,
    "test_search_callbacks_with_partial_fit_failures": _NO_ROW,
    "test_array_api_search_cv_classifier": "needs the array API, which GridSearchCV's own tests skip here, too",
}
REVIEWED = "1.9.1"
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        sklearn.__version__ != REVIEWED,
        reason=f"what cannot apply was reviewed for scikit-learn {REVIEWED}",
    ),
]


def _theirs() -> dict[str, object]:
    found = importlib.util.find_spec("sklearn.model_selection.tests.test_search")
    assert found is not None
    assert found.origin is not None
    source = sklearn_shim.swapped(Path(found.origin).read_text())
    names: dict[str, object] = {"__name__": __name__}
    exec(compile(source, found.origin, "exec"), names)
    return names


def _left_out(reason: str) -> Callable[[], None]:
    @pytest.mark.skip(reason=f"cannot apply: {reason}")
    def left_out() -> None: ...

    return left_out


if sklearn.__version__ == REVIEWED:
    for _name, _thing in _theirs().items():
        if not _name.startswith("__"):
            globals()[_name] = _thing
    for _name, _reason in CANNOT_APPLY.items():
        assert callable(globals().get(_name)), f"there is no {_name} any more"
        globals()[_name] = _left_out(_reason)
