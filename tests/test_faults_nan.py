"""NaN and infinity at six places: what is stored stays finite, and the study goes on.

1,000 random ones are in ``benchmarks/reliability/nan.py``.
"""

from __future__ import annotations

import itertools

import poisons
import pytest

CASES = list(itertools.product(poisons.PLACES, poisons.ESTIMATORS))


@pytest.mark.parametrize("what", poisons.SURVIVES)
@pytest.mark.parametrize(("place", "estimator"), CASES)
def test_what_is_stored_stays_finite(place: str, estimator: str, what: str) -> None:
    kind = poisons.KINDS[CASES.index((place, estimator)) % 3]
    assert not poisons.SURVIVES[what](poisons.Poison(place, estimator, kind=kind))
