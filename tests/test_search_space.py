"""Bounds and coordinates of a continuous hyperparameter."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optuna_hypergrad as ohg

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
finite = st.floats(-1e4, 1e4, allow_nan=False)


@given(
    finite, finite, st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.sampled_from(DTYPES)
)
@settings(max_examples=150, deadline=None)
def test_values_never_leave_the_bounds(low, high, internal, dtype) -> None:
    low, high = sorted((low, high))
    domain = ohg.Domain(low, high)
    inside = domain.bounds_as(torch.zeros((), dtype=dtype))
    if inside[0] > inside[1]:
        return  # the dtype has no value between the bounds
    value = domain.to_external(torch.tensor(internal, dtype=dtype))
    assert float(value.double().min()) >= low
    assert float(value.double().max()) <= high
    assert domain.contains(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_unit_below_the_dtype_does_not_make_nan(dtype) -> None:
    domain = ohg.Domain(0.0, 1e-205)
    value = domain.to_external(torch.tensor([-math.inf, 3.0, 65520.0, math.inf], dtype=dtype))
    assert domain.contains(value)


@given(
    st.floats(1e-7, 1e3), st.floats(1.0, 1e6), st.lists(st.floats(-50, 50), min_size=1, max_size=5)
)
@settings(max_examples=150, deadline=None)
def test_logarithmic_values_never_leave_the_bounds(low, ratio, internal) -> None:
    domain = ohg.Domain(low, low * ratio, log=True)
    value = domain.to_external(torch.tensor(internal, dtype=torch.float64))
    assert float(value.min()) >= low
    assert float(value.max()) <= low * ratio


@pytest.mark.parametrize(
    "domain",
    [ohg.Domain(1e-3, 10.0, log=True), ohg.Domain(-2.0, 3.0), ohg.Domain(unit=0.2), ohg.Domain()],
)
def test_internal_gradient_is_the_derivative_of_the_external_value(domain) -> None:
    value = torch.tensor([0.3, 1.7], dtype=torch.float64)
    internal = domain.to_internal(value).requires_grad_()
    back = domain.to_external(internal)
    assert torch.allclose(back, value, rtol=1e-14)
    slope = torch.tensor([2.0, -3.0], dtype=torch.float64)
    (exact,) = torch.autograd.grad(back, internal, slope)
    assert torch.allclose(domain.internal_gradient(slope, value), exact, rtol=1e-14)


def test_internal_bounds_are_the_bounds() -> None:
    assert ohg.Domain(1e-3, 10.0, log=True).internal_bounds() == (math.log(1e-3), math.log(10.0))
    assert ohg.Domain(-2.0, 3.0).internal_bounds() == (-4.0, 6.0)
    assert ohg.Domain().internal_bounds() == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("domain", "middle"),
    [
        (ohg.Domain(1e-4, 1e2, log=True), 1e-1),
        (ohg.Domain(-1.0, 3.0), 1.0),
        (ohg.Domain(), 0.0),
        (ohg.Domain(2.0, math.inf), 2.0),
    ],
)
def test_midpoint(domain, middle) -> None:
    assert domain.midpoint() == pytest.approx(middle)


@pytest.mark.parametrize(
    "domain", [ohg.Domain(0.1, 0.7, log=True), ohg.Domain(), ohg.Domain(0, 1, unit=0.3)]
)
def test_json_round_trip(domain) -> None:
    assert ohg.Domain.from_json(json.loads(json.dumps(domain.to_json()))) == domain


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        (ohg.Domain(1.0, 0.0), "swap them"),
        (ohg.Domain(math.nan, 1.0), "is NaN"),
        (ohg.Domain(0.0, 1.0, log=True), "raise low above 0"),
        (ohg.Domain(-1.0, 1.0, log=True), "raise low above 0"),
        (ohg.Domain(1.0, math.inf, log=True), "finite high"),
        (ohg.Domain("0", 1.0), "is not a number"),
        (ohg.Domain(True, 2.0), "is not a number"),
        (ohg.Domain(0.0, 1.0, unit=0.0), "positive finite"),
    ],
)
def test_unusable_bounds_are_refused_by_name(domain, message) -> None:
    with pytest.raises(ohg.HyperparameterError, match=message) as caught:
        domain.check("learning_rate")
    assert "'learning_rate'" in str(caught.value)
