"""Under the default retention a database stops growing. 1,000 are in ``benchmarks/reliability/growth.py``."""

from __future__ import annotations

from pathlib import Path

import growing
import pytest


@pytest.mark.parametrize("what", growing.SIZES)
def test_the_database_stops_growing(what: str, tmp_path: Path) -> None:
    at = [20, 60]
    sizes = growing.SIZES[what](tmp_path, at, lambda: None)
    assert not growing.too_large(what, at, sizes)
    assert sizes[-1] - sizes[0] < growing.everything(what, 60 - 20)
