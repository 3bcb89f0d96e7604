"""kill -9 at a random instant: another process goes on, and ends with the same study, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import cut_off
import optuna
import pytest

import optuna_hypergrad as ohg
from optuna_hypergrad.stores import TensorStore

KILLS = 4


@pytest.mark.parametrize("name", cut_off.WORKS)
def test_a_killed_worker_is_followed_by_another_as_if_nothing_had_been(
    name: str, tmp_path: Path
) -> None:
    whole = cut_off.Whole("sqlite", tmp_path / "whole", name)
    rng = random.Random(name)
    killed = study = 0
    while killed < KILLS:
        study += 1
        kills, wrong = whole.cut_off(tmp_path / f"study {study}", rng, 2)
        killed += kills
        assert wrong == [], f"study {study}, after {kills} kills"


class Events(list[str]):
    write = list.append


def test_a_step_is_taken_only_when_the_last_checkpoint_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events, save = Events(), TensorStore.save_all_soon

    def save_soon(*args: Any) -> Any:
        future: Any = save(*args)
        events.write("saving")
        whole = future.result
        monkeypatch.setattr(future, "result", lambda: events.write("whole") or whole())
        return future

    monkeypatch.setattr(TensorStore, "save_all_soon", save_soon)
    study = optuna.create_study(sampler=ohg.HypergradientSampler(seed=0))
    cut_off.long_run(study, events)  # type: ignore[arg-type]
    steps = [e for e in events if e != "evaluated"]
    assert steps == ["stepped", "saving", "whole"] * cut_off.RUN_STEPS
