"""Progress bars of bilevel runs, beside those of their study, and what the logger says meanwhile."""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import optuna
import pytest
import torch
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import _optuna, _progress

F64 = torch.float64


def inner(w: Any, lam: Any, batch: None) -> Tensor:
    return ((w["w"] - 1.0) ** 2).sum() / 2 + (lam["decay"] * w["w"] ** 2).sum() / 2


def outer(w: Any, lam: Any, batch: None) -> Tensor:
    return ((w["w"] - 0.4) ** 2).sum()


def run(trial: optuna.Trial | None = None, **settings: Any) -> ohg.BilevelResult:
    return ohg.minimize_bilevel(
        ohg.BilevelProblem(inner, outer),
        {"w": torch.zeros(3, dtype=F64)},
        {"decay": torch.full((3,), 0.1, dtype=F64)},
        inner_solver=ohg.GradientDescent(0.3, max_steps=5),
        bounds={"decay": ohg.Domain(1e-3, 10.0, log=True)},
        num_steps=6,
        trial=trial,
        progress=True,
        **settings,
    )


def objective(trial: optuna.Trial) -> float:
    return run(trial).outer_value


@pytest.fixture
def slow_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step is drawn, however fast."""

    class Eager(_progress.tqdm):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "mininterval": 0.0, "miniters": 1})

    monkeypatch.setattr(_progress, "tqdm", Eager)


def test_bar_says_value_norm_step_and_time_left(
    slow_bars: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run()
    shown = capsys.readouterr().err
    for record in found.history[:-1]:
        assert f"value {record['outer_value']:.5g}" in shown
        assert f"|hypergradient| {record['hypergradient_norm']:.2g}" in shown
        assert f"|step| {record['step_length']:.2g}" in shown
    assert re.search(r"bilevel:  50%.*3/6 \[\d\d:\d\d<\d\d:\d\d,", shown)


def test_length_of_a_step_is_that_of_the_move_in_natural_steps() -> None:
    settings: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5)}
    found = run(**settings)
    for record in found.history:  # nothing is held back by a bound here
        assert record["step_length"] == pytest.approx(0.5 * record["hypergradient_norm"], rel=1e-12)


def test_bars_of_study_and_run_are_nested(
    slow_bars: None, capsys: pytest.CaptureFixture[str]
) -> None:
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=2, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert "trial 0, bilevel:" in shown
    assert "trial 1, bilevel:" in shown
    assert "Best trial" in shown
    assert "2/2" in shown
    assert "\x1b[A" in shown  # back from the line below to that of the study
    last = shown.replace("\x1b[A", "").split("\r")[-1]
    assert "bilevel" not in last  # the run's bar is gone at its end


@pytest.mark.parametrize("level", [optuna.logging.INFO, optuna.logging.ERROR])
def test_what_is_logged_meanwhile_goes_above_the_bar(
    level: int, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, before = logging.getLogger("optuna"), optuna.logging.get_verbosity()
    handlers = list(logger.handlers)
    stream = io.StringIO()

    def talking(w: Any, lam: Any, batch: None) -> Tensor:
        _optuna.logger.warning("Something is odd.")
        return outer(w, lam, batch)

    optuna.logging.set_verbosity(level)
    try:
        ohg.minimize_bilevel(
            ohg.BilevelProblem(inner, talking),
            {"w": torch.zeros(3, dtype=F64)},
            {"decay": torch.full((3,), 0.1, dtype=F64)},
            inner_solver=ohg.GradientDescent(0.3, max_steps=5),
            bounds={"decay": ohg.Domain(1e-3, 10.0, log=True)},
            num_steps=2,
            progress=True,
        )
    finally:
        optuna.logging.set_verbosity(before)
    assert set(logger.handlers) == set(handlers)
    assert not stream.getvalue()
    output, error = capsys.readouterr()
    said = (output + error).count("Something is odd.")
    assert (said > 0) == (level == optuna.logging.INFO)


def test_bars_in_threads(capsys: pytest.CaptureFixture[str]) -> None:
    handlers = list(logging.getLogger("optuna").handlers)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    study.optimize(objective, n_trials=4, n_jobs=2, show_progress_bar=True)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 4
    assert set(logging.getLogger("optuna").handlers) == set(handlers)


def test_no_bar_unless_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    run_without = {"progress": False}
    ohg.minimize_bilevel(
        ohg.BilevelProblem(inner, outer),
        {"w": torch.zeros(3, dtype=F64)},
        {"decay": torch.full((3,), 0.1, dtype=F64)},
        inner_solver=ohg.GradientDescent(0.3, max_steps=5),
        num_steps=2,
        **run_without,  # type: ignore[arg-type]
    )
    assert capsys.readouterr() == ("", "")
