"""What ``optuna_hypergrad`` offers by name, and what it leaves alone until somebody asks for it."""

from __future__ import annotations

import subprocess
import sys

import optuna_hypergrad as ohg


def test_every_public_name_is_there_and_listed() -> None:
    assert len(set(ohg.__all__)) == len(ohg.__all__)
    for name in ohg.__all__:
        assert getattr(ohg, name) is not None
        assert name in dir(ohg)
    assert {"HypergradientSampler", "HypergradientSearchCV", "visualization"} <= set(ohg.__all__)


def test_estimators_and_figures_are_imported_where_they_are_used() -> None:
    script = (
        "import sys, optuna_hypergrad as ohg\n"
        "assert not {'sklearn', 'plotly', 'matplotlib', 'optuna_dashboard'} & set(sys.modules)\n"
        "ohg.HypergradientSearchCV\n"
        "assert 'sklearn' in sys.modules\n"
        "from optuna_hypergrad import *\n"
        "HypergradientClassifier, visualization, minimize_bilevel\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
