"""BROS: unbiased in every form, MA-SOBA where the subspace is the whole space, and little memory."""

from __future__ import annotations

import functools
import weakref

import cases
import pytest
import torch
from problems import F64, Params, randn, relative_error
from test_single_loop import resumed

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients import EstimatorState
from optuna_hypergrad.hypergradients._sketches import Sketch, draw, sketched_gradient

SHAPES = {"a": (6, 3), "bias": (4,), "conv": (4, 2, 1)}
TARGET = {k: randn(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}
ROOT = randn(30, 30, seed=9)
H, B = ROOT @ ROOT.T / 30 + 0.3 * torch.eye(30, dtype=F64), randn(30, 4, seed=10)
W, LAM = {k: torch.zeros_like(v) for k, v in TARGET.items()}, {"x": randn(4, seed=3)}
V = {k: randn(*s, seed=50 + i) for i, (k, s) in enumerate(SHAPES.items())}
ONE = ohg.GradientDescent(0.2, max_steps=1)


def flat(w: Params) -> torch.Tensor:
    return torch.cat([v.reshape(-1) for v in w.values()])


def inner(w: Params, lam: Params, _: object) -> torch.Tensor:
    u = flat(w)
    return 0.5 * u @ (H @ u) - u @ (B @ lam["x"])


def outer(w: Params, lam: Params, _: object) -> torch.Tensor:
    return 0.5 * ((flat(w) - flat(TARGET)) ** 2).sum() + 0.5 * (lam["x"] ** 2).sum()


PROBLEM = ohg.BilevelProblem(inner, outer)
FORMS = [
    ("one_sided", "gaussian", 2),
    ("one_sided", "orthonormal", 0.5),
    ("bi_probe", "gaussian", 3),
    ("bi_probe", "rademacher", 2),
    ("two_sketch", "orthonormal", 2),
]


@pytest.mark.parametrize(("correction", "law", "rank"), FORMS)
def test_the_action_of_the_hessian_is_unbiased(correction, law, rank) -> None:
    """All entries of the mean of 300 draws within 4.5 standard errors of ``H v``, and of ``M^T v``."""
    estimator = ohg.BROS(rank=rank, correction=correction, law=law)
    products, mixed, slopes = [], [], []
    for count in range(300):
        sketches = estimator._drawn(count, 0, W)
        found = estimator.action(PROBLEM, V, LAM, V, count, 0, sketches)
        products.append(flat({k: s.up(found.product[k]) for k, s in sketches.items()}))
        slopes.append(flat({k: s.up(found.slope[k]) for k, s in sketches.items()}))
        mixed.append(found.mixed["x"])
    v = flat(V)
    for draws, exact in ((products, H @ v), (slopes, H @ v - B @ LAM["x"]), (mixed, -B.T @ v)):
        seen = torch.stack(draws)
        error = seen.std(0) / len(seen) ** 0.5 + 1e-12 * exact.norm()
        assert float(((seen.mean(0) - exact) / error).abs().max()) < 4.5


@pytest.mark.parametrize("law", ["gaussian", "rademacher", "orthonormal"])
def test_sketches_are_isotropic_and_scaled(law) -> None:
    block = {"a": torch.zeros(5, 2, dtype=F64)}
    total = torch.zeros(5, 5, dtype=F64)
    for seed in range(800):
        basis = draw("X", law, 2, (seed,), block)["a"].basis
        total += basis @ basis.T / 800
        if law == "orthonormal":
            assert torch.allclose(basis.T @ basis, 2.5 * torch.eye(2, dtype=F64), atol=1e-12)
    assert float((total - torch.eye(5, dtype=F64)).abs().max()) < 0.15


def test_the_whole_space_is_ma_soba() -> None:
    settings = {
        "num_steps": 25,
        "inner_solver": ONE,
        "optimizer": functools.partial(torch.optim.SGD, lr=0.02),
    }
    whole = ohg.minimize_bilevel(PROBLEM, W, LAM, estimator=ohg.MASOBA(theta=0.3), **settings)
    sketched = ohg.minimize_bilevel(
        PROBLEM, W, LAM, estimator=ohg.BROS(rank=1.0, law="orthonormal", theta=0.3), **settings
    )
    assert relative_error(sketched.outer_params, whole.outer_params) < 1e-10
    assert relative_error(sketched.inner_params, whole.inner_params) < 1e-10
    for a, b in zip(sketched.history, whole.history, strict=True):
        for k in ("outer_value", "hypergradient_norm", "residual"):
            assert a[k] == pytest.approx(b[k], rel=1e-10)


@pytest.mark.parametrize(("share", "factor"), [(None, 5 / 6), (0.7, 0.7)])
def test_matrices_that_are_named_stay_whole(share: float | None, factor: float) -> None:
    """``"conv"`` has fewer rows than the rank; the first step, where ``v = 0``, by the formulas."""
    estimator = ohg.BROS(0.3, rank=5, whole=("conv",), share=share, theta=1.0)
    found = ohg.hypergradient(PROBLEM, V, LAM, estimator=estimator, inner_solver=ONE)
    w = {k: x.clone().requires_grad_() for k, x in V.items()}
    slopes = (
        dict(zip(w, torch.autograd.grad(f(w, LAM, None), tuple(w.values())), strict=True))
        for f in (inner, outer)
    )
    g, f = slopes
    basis = draw("X", "gaussian", 5, (0, 0, 0), {"a": W["a"]})["a"].basis
    for slope in (g, f):
        slope["a"] = factor * (basis @ (basis.T @ slope["a"]))
    after = {k: V[k] - 0.2 * g[k] for k in V}
    assert relative_error(found.inner_params, after) < 1e-12
    v = {k: found.state.tensors[f"v/{k}"] for k in V}
    assert relative_error(v, {k: 0.3 * x for k, x in f.items()}) < 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
def test_velocities_in_the_whole_space_are_those_of_the_solver(nesterov: bool) -> None:
    solver = ohg.HeavyBall(0.05, max_steps=1, momentum=0.7, nesterov=nesterov)
    found = []
    for estimator in (
        ohg.MASOBA(0.2, theta=0.3),
        ohg.BROS(0.2, rank=1.0, law="orthonormal", theta=0.3, refresh=100),
    ):
        found.append(
            ohg.minimize_bilevel(
                PROBLEM, W, LAM, estimator=estimator, inner_solver=solver, num_steps=12
            )
        )
    assert relative_error(found[1].outer_params, found[0].outer_params) < 1e-10


@pytest.mark.parametrize(
    ("estimator", "inner_solver"),
    [
        (ohg.BROS(rank=2), ONE),
        (ohg.BROS(0.1, rank=2, refresh=4), ohg.HeavyBall(0.1, max_steps=1)),
        (ohg.BROS(0.05, rank=3, correction="bi_probe", refresh=2, seed=4), ONE),
        (ohg.BROS(0.05, correction="two_sketch", law="rademacher", damping=0.1), ONE),
    ],
    ids=["one_sided", "velocity", "bi_probe", "two_sketch"],
)
def test_a_run_is_continued_bit_for_bit(estimator, inner_solver) -> None:
    resumed(estimator, inner_solver, PROBLEM, W, LAM)


def test_no_gradient_of_more_than_one_block_lives_at_a_time() -> None:
    """Of ten blocks of one size, the gradients that autograd hands over are let go one by one."""
    alive: set[weakref.ref] = set()
    most = 0

    class Watched(Sketch):
        def down(self, block: torch.Tensor) -> torch.Tensor:
            nonlocal most
            most = max(most, 1 + sum(ref() is not None for ref in alive))
            alive.add(weakref.ref(block))
            return super().down(block)

    w = {f"w{i}": randn(6, 6, seed=i).requires_grad_() for i in range(10)}
    x = randn(6, seed=20)
    for v in w.values():
        x = torch.tanh(v @ x)
    drawn = draw("X", "gaussian", 2, (0,), w)
    watched = {k: Watched(s.shape, s.basis) for k, s in drawn.items()}
    sketched_gradient(x.sum(), w, {}, watched)
    assert most <= 2


def test_products_are_gone_before_the_next_inner_params_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is of the size of a subspace does not add to ``w`` before and after the step."""
    seen: list[weakref.ref] = []
    alive: list[int] = []

    class Watching(ohg.BROS):
        def action(self, *arguments):
            found = super().action(*arguments)
            seen.extend(map(weakref.ref, found.product.values()))
            return found

        def _descended(self, *arguments):
            alive.append(sum(ref() is not None for ref in seen))
            return super()._descended(*arguments)

    case = cases.case("logistic")
    Watching(rank=0.5).estimate(case.problem, ONE, case.inner_params, case.outer_params)
    assert alive == [0]
    assert seen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ohg.BROS(rank=0), "rank to be an integer >= 1, or a fraction"),
        (lambda: ohg.BROS(rank=1.5), "rank to be an integer >= 1, or a fraction"),
        (lambda: ohg.BROS(rank=True), "rank to be an integer >= 1, or a fraction"),
        (lambda: ohg.BROS(rank="8"), "rank to be an integer >= 1, or a fraction"),
        (lambda: ohg.BROS(law="uniform"), "law to be one of 'gaussian', 'rademacher'"),
        (lambda: ohg.BROS(correction="none"), "correction to be one of 'one_sided', 'bi_probe'"),
        (
            lambda: ohg.BROS(rank=4, correction="bi_probe", law="orthonormal"),
            "law='orthonormal' depend on each other .* use law='gaussian'",
        ),
        (lambda: ohg.BROS(correction="bi_probe"), "bi_probe needs one rank >= 2 for all blocks"),
        (lambda: ohg.BROS(rank=1, correction="bi_probe"), "bi_probe needs one rank >= 2"),
        (lambda: ohg.BROS(refresh=0), "refresh >= 1"),
        (lambda: ohg.BROS(share=0.0), "share to be a finite number > 0, or None"),
        (lambda: ohg.BROS(whole="conv"), r"whole to be a tuple of names .* got 'conv'"),
        (lambda: ohg.BROS(theta=0), "0 < theta <= 1"),
        (lambda: ohg.BROS(seed=-1), "seed >= 0"),
        (lambda: ohg.BROS(0.0), "step_size to be a finite number > 0"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("estimator", "inner_solver", "inner_params", "message"),
    [
        (ohg.BROS(rank=5), ONE, W, r"BROS\(rank=5\) is larger than the inner parameter 'conv'"),
        (ohg.BROS(), ONE, {"bias": W["bias"]}, "no matrix among the inner parameters"),
        (ohg.BROS(whole=("a", "conv")), ONE, W, "no matrix .* but those that whole= names"),
        (
            ohg.BROS(whole=("embed",)),
            ONE,
            W,
            "'embed' whole, and there is no .* out of 'a', 'bias'",
        ),
        (ohg.BROS(0.1), ohg.Adam(0.1, max_steps=1), W, "was given Adam; pass GradientDescent"),
        (
            ohg.BROS(),
            ohg.GradientDescent(0.1, max_steps=1, max_norm=1.0),
            W,
            "without max_norm",
        ),
        (ohg.BROS(0.1), ohg.HeavyBall(0.1, max_steps=1), W, "with refresh=1 it would have no"),
        (ohg.BROS(), ohg.GradientDescent(0.1), W, "pass max_steps=1"),
    ],
)
def test_what_it_cannot_do_is_refused(estimator, inner_solver, inner_params, message) -> None:
    with pytest.raises(ohg.RequirementError, match=message):
        ohg.hypergradient(
            PROBLEM, inner_params, LAM, estimator=estimator, inner_solver=inner_solver
        )


class Twice(torch.autograd.Function):
    """A square with derivatives of any order, in reverse only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope * ctx.saved_tensors[0]


def test_an_operation_without_forward_mode_is_named() -> None:
    problem = ohg.BilevelProblem(lambda w, lam, _: Twice.apply(flat(w)).sum() * lam["x"][0], outer)
    with pytest.raises(
        ohg.RequirementError, match=r"forward-mode .*autograd.Function.* or use MASOBA"
    ):
        ohg.BROS().estimate(problem, ONE, W, LAM, state=EstimatorState())


def test_a_state_whose_v_was_moved_is_gone_on_from_only_once() -> None:
    case = cases.case("quadratic")
    args = case.problem, ONE, case.inner_params, case.outer_params
    first = ohg.BROS(rank=0.5).estimate(*args)
    kept = EstimatorState(
        first.state.inner_index,
        None,
        {k: x.clone() for k, x in first.state.tensors.items()},
        dict(first.state.numbers),
    )
    second = ohg.BROS(rank=0.5).estimate(*args, step=1, state=first.state)
    with pytest.raises(ohg.RequirementError, match="after step 1, whose v is that of step 2"):
        ohg.BROS(rank=0.5).estimate(*args, step=1, state=first.state)
    again = ohg.BROS(rank=0.5).estimate(*args, step=1, state=kept)
    for k, x in second.state.tensors.items():
        assert torch.equal(x, again.state.tensors[k])


def test_a_state_whose_step_broke_off_is_not_gone_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ``v`` has been moved, or half of it."""
    case = cases.case("quadratic")
    args = case.problem, ONE, case.inner_params, case.outer_params
    state = ohg.BROS(rank=0.5).estimate(*args).state
    with monkeypatch.context() as broken:
        broken.setattr(ohg.BROS, "_descended", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ohg.BROS(rank=0.5).estimate(*args, step=1, state=state)
    with pytest.raises(ohg.RequirementError, match="after step 1, whose v is that of step 2"):
        ohg.BROS(rank=0.5).estimate(*args, step=1, state=state)


def interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_inner_params_in_any_order_of_memory() -> None:
    """A transposed matrix, as a module may hold it, moves as a copy of it does."""
    case = cases.case("logistic")
    found = []
    for turned in (False, True):
        w = {
            k: x.mT.contiguous().mT if turned and x.ndim == 2 else x.contiguous()
            for k, x in case.inner_params.items()
        }
        state = EstimatorState()
        for step in range(3):
            estimate = ohg.BROS(rank=0.5).estimate(
                case.problem, ONE, w, case.outer_params, step, state
            )
            w, state = estimate.inner_params, estimate.state
        found.append(w)
    for k, x in found[0].items():
        torch.testing.assert_close(x, found[1][k], rtol=1e-12, atol=0)
