"""A trajectory has exactly one owner, also when many want it at once, or one wakes up late."""

from __future__ import annotations

import random
from pathlib import Path

from crowds import PausedOwners, races_with_no_single_winner

RACES, RACERS, PAUSED = 20, 3, 3


def test_exactly_one_gets_the_step(tmp_path: Path) -> None:
    assert races_with_no_single_winner("sqlite", tmp_path / "study", RACERS, RACES) == (0, [])


def test_a_paused_owner_is_refused(tmp_path: Path) -> None:
    owners, rng, paused = PausedOwners("sqlite", tmp_path / "study"), random.Random(0), 0
    for _ in range(4 * PAUSED):
        late, wrong = owners.pause(rng)
        paused += late
        assert wrong == []
        if paused == PAUSED:
            return
    raise AssertionError(f"only {paused} of {4 * PAUSED} were taken over")
