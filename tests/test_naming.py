"""Any text is a name, or is refused before anything is stored.

The large version: ``benchmarks/reliability/names.py``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from naming import Names, all_names, try_names
from specimen import Specimen, command_in_haste, opened


def test_any_text_is_a_name_or_refused(tmp_path: Path) -> None:
    found = Counter[str]()

    @settings(
        max_examples=66,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(all_names())
    def check(names: Names) -> None:
        found[try_names(storage, names)] += names.num_odd

    with opened(Specimen(tmp_path).path) as storage, command_in_haste():
        check()
    assert found.total() >= 200
    assert min(found["stored"], found["refused"]) > 40
