"""One write into the database fails: what was stored is there, and the study ends as if nothing had been.

Every k from 1 to 100 is in ``benchmarks/reliability/kth_write.py``.
"""

from __future__ import annotations

from pathlib import Path

import failing_writes
import pytest


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty") / "study.db"


@pytest.mark.parametrize(
    ("what", "k"),
    [
        ("study", 4),
        ("study", 5),
        ("study", 14),
        ("study", 33),
        ("run", 4),
        ("run", 11),
        ("run", 22),
    ],
)
def test_kth_write_fails_and_nothing_is_lost(
    what: str, k: int, template: Path, tmp_path: Path
) -> None:
    path = failing_writes.new_database(template, tmp_path)
    assert not failing_writes.WITH_FAILING_WRITE[what](path, k)


def test_a_trial_whose_end_cannot_be_written_is_done_again_at_once(
    template: Path, tmp_path: Path
) -> None:
    path = failing_writes.new_database(template, tmp_path)
    assert not failing_writes.study_with_failing_write(path, 4, "UPDATE TRIALS SET STATE")
