"""Damage to stored tensors is found, whatever it is, and what was stored before is used instead.

The large version: ``benchmarks/reliability/damaged_blobs.py``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from damages import DAMAGES, check
from specimen import Specimen


@pytest.mark.timeout(1200)  # ten seconds, on a machine that does nothing else
def test_damage_is_found_and_the_state_before_is_used(tmp_path: Path) -> None:
    cases = list(check(Specimen(tmp_path), tmp_path, 300, 28, seed=0))
    assert [case for case in cases if case.failure is not None] == []
    assert min(Counter(case.damage for case in cases)[name] for name in DAMAGES) > 40
