"""Every value that is given to an objective or stored is a number within its bounds, exactly.

50,000 cases are in ``benchmarks/reliability/bounds.py``.
"""

from __future__ import annotations

import functools
import math

import boundaries
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import optuna_hypergrad as ohg

CASES = st.builds(
    boundaries.Case,
    kind=st.sampled_from(list(boundaries.RANGES)),
    log=st.booleans(),
    dtype=st.sampled_from(boundaries.DTYPES),
    optimizer=st.sampled_from([*boundaries.RULES, *boundaries.OPTIMIZERS]),
    slope=st.sampled_from(boundaries.SLOPES),
    seed=st.integers(0, 2**31 - 1),
)


def many(examples: int):
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@many(180)
@given(CASES)
def test_trajectories_stay_within_their_bounds(case: boundaries.Case) -> None:
    assert not boundaries.trajectory_leaves_its_bounds(case)


@many(90)
@given(CASES)
def test_minimize_bilevel_stays_within_its_bounds(case: boundaries.Case) -> None:
    assert not boundaries.run_leaves_its_bounds(case)


@many(30)
@given(CASES)
def test_studies_stay_within_their_bounds(case: boundaries.Case) -> None:
    assert not boundaries.study_leaves_its_bounds(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bounds", [(0.3, 0.30000000000000004), (1e39, 1e300), (1e-320, 1e-310)])
def test_a_range_without_a_number_of_its_dtype_is_refused(
    bounds: tuple[float, float], dtype: torch.dtype
) -> None:
    like = torch.full((2,), 1.0, dtype=dtype)
    with pytest.raises(ohg.HyperparameterError, match=r"'x': no number of torch\.\w+ lies between"):
        boundaries.tensor_start("x", ohg.Domain(*bounds), 2, None, dtype, None)
    with pytest.raises(ohg.HyperparameterError, match="'x': no number of"):
        ohg.minimize_bilevel(
            ohg.BilevelProblem(lambda w, x, _: w["w"] * 0, lambda w, x, _: x["x"].sum()),
            {"w": torch.zeros(())},
            {"x": like},
            inner_solver=ohg.GradientDescent(),
            num_steps=1,
            bounds={"x": bounds},
        )


def test_an_optimizer_that_overflows_ends_the_run_where_it_was() -> None:
    problem = ohg.BilevelProblem(
        lambda w, lam, _: 0.5 * (w["w"] - lam["x"]) ** 2, lambda w, lam, _: 1e20 * w["w"]
    )
    found = ohg.minimize_bilevel(
        problem,
        {"w": torch.tensor(0.0, dtype=torch.float64)},
        {"x": torch.tensor(0.5, dtype=torch.float64)},
        inner_solver=ohg.GradientDescent(0.5, max_steps=3),
        optimizer=functools.partial(torch.optim.SGD, lr=1e300),
        num_steps=3,
        throw=False,
    )
    assert not found.result
    assert "Outer step 0: SGD moved 'x' to NaN or infinite entries" in found.result.message
    assert float(found.outer_params["x"]) == 0.5
    assert math.isfinite(found.outer_value)
