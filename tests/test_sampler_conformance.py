"""Optuna's own tests of a sampler, over every kind of storage that a workstation has."""

from __future__ import annotations

import functools
from collections.abc import Callable

import optuna
import pytest
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import BaseStorage
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)

from optuna_hypergrad.studies import HypergradientSampler


@pytest.fixture(autouse=True)
def _studies_in_storage(storage: BaseStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """``create_study()`` without a storage, as those tests call it, uses the parametrized one."""
    create = functools.partial(optuna.create_study, storage=storage)
    monkeypatch.setattr(optuna, "create_study", create)
    monkeypatch.setattr(optuna.study, "create_study", create)


class TestOverTPE(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: HypergradientSampler(seed=0)


@pytest.mark.parametrize("storage", ["memory"], indirect=True)
class TestOverRandom(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: HypergradientSampler(RandomSampler(seed=0))
