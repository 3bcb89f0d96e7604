"""kill -9 at a random instant: another process goes on, and ends with the same study, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import lives
import pytest

KILLS = 6


@pytest.mark.parametrize("name", lives.WORKS)
def test_a_killed_worker_is_followed_by_another_as_if_nothing_had_been(
    name: str, tmp_path: Path
) -> None:
    whole = lives.Whole("sqlite", tmp_path / "whole", name)
    rng = random.Random(name)
    killed = study = 0
    while killed < KILLS:
        study += 1
        kills, wrong = whole.cut_off(tmp_path / f"study {study}", rng, 2)
        killed += kills
        assert wrong == [], f"study {study}, after {kills} kills"
