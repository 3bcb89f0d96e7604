"""The mutation suite: each mutant of the method is killed by a named test.

Each row edits one line of a copy of the package and runs the tests that should notice. A row fails if
the line is gone (update the row), if the mutant survives, or if the tests could not run at all.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    what: str
    file: str
    old: str
    new: str
    killed_by: str
    also: tuple[tuple[str, str, str], ...] = ()

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


TABLES = "tests/test_tables.py"
TRUTHS = "tests/test_truths.py"
CLOSED = "tests/test_closed_form.py"
REVERSIBLE = "tests/test_reversible.py"
UNDONE = f"{REVERSIBLE}::test_two_thousand_steps_are_undone_bit_for_bit[0.9]"
OUTER = "tests/test_minimize_bilevel.py"
FORWARD = "tests/test_forward.py::test_forward_mode_equals_plain_autograd"
DIRECTIONS = "tests/test_forward_gradient.py"
DIFFERENCES = "tests/test_zeroth_order.py"
RIDGE = f"{TABLES}::test_estimator_matches_the_truth_or_names_the_mismatch[Implicit-CG-LBFGS-ridge]"

MUTANTS = [
    Mutant(
        "flip the sign of the direct term",
        "hypergradients/_base.py",
        "parts[0] + parts[1]",
        "parts[1] - parts[0]",
        RIDGE,
    ),
    Mutant(
        "flip the sign of the indirect term",
        "hypergradients/implicit.py",
        "graph.cross_vjp(found.x.neg_())",
        "graph.cross_vjp(found.x)",
        RIDGE,
    ),
    Mutant(
        "drop alpha from Neumann",
        "ihvp/neumann.py",
        "total.mul_(alpha) if x0 is None",
        "total if x0 is None",
        f"{TRUTHS}::test_unrolled_descent_from_the_solution_equals_neumann",
    ),
    Mutant(
        "use the old residual in CG",
        "ihvp/cg.py",
        "torch.add(r, p, alpha=rr / before, out=p)",
        "torch.add(old, p, alpha=rr / before, out=p)",
        f"{TABLES}::test_linear_solver_converges_or_says_why_not[cg-spd0]",
        also=(
            ("ihvp/cg.py", "r.sub_(hp, alpha=alpha)", "old = r.clone(); r.sub_(hp, alpha=alpha)"),
        ),
    ),
    Mutant(
        "return CG's iterate before the last update",
        "ihvp/cg.py",
        "x.add_(p, alpha=alpha)",
        "x, ahead = (x, x + alpha * p) if _ == 0 else (ahead, ahead + alpha * p)",
        f"{TRUTHS}::test_cg_iterates_are_krylov_minimizers",
    ),
    Mutant(
        "the outer product of the gradient in place of the Hessian",
        "operators.py",
        "        return self.graph.hvp(vector, out)",
        "        return self.graph.slope * torch.dot(self.graph.slope, vector)",
        RIDGE,
        also=(
            (
                "operators.py",
                "self.value = value.detach()",
                "self.slope = self.layout.flatten([g.detach() for g in gradients])",
            ),
        ),
    ),
    Mutant(
        "add the identity to the damped operator",
        "operators.py",
        "self.base(vector, out), vector, alpha=self.damping",
        "self.base(vector, out), vector, alpha=1.0 + self.damping",
        f"{TRUTHS}::test_damping_is_added_once",
    ),
    Mutant(
        "forget the damping",
        "hypergradients/implicit.py",
        "if self.damping:",
        "if False:",
        f"{TRUTHS}::test_damped_hypergradient_solves_the_damped_system",
    ),
    Mutant(
        "drop the chain rule of the log transform",
        "search_space.py",
        "return gradient * value if self.log",
        "return gradient if self.log",
        f"{OUTER}::test_log_coordinates_take_the_chain_rule",
    ),
    Mutant(
        "forget the projection of external values",
        "search_space.py",
        "return value.clamp(low, high)",
        "return value",
        f"{OUTER}::test_bounds_hold_at_every_step_exactly",
    ),
    Mutant(
        "forget the projection of internal coordinates",
        "outer_run.py",
        "internal.detach().clamp(low, high)",
        "internal.detach().clamp(low - 1e3, high + 1e3)",
        f"{OUTER}::test_a_bound_lets_go_when_the_gradient_turns",
    ),
    Mutant(
        "round bounds outwards",
        "search_space.py",
        "if bool(outside) and math.isfinite(bound):",
        "if False:",
        f"{OUTER}::test_bounds_hold_at_every_step_exactly",
    ),
    Mutant(
        "truncate one step too early",
        "hypergradients/unroll.py",
        "lead = inner_solver.max_steps - self.truncation",
        "lead = inner_solver.max_steps - self.truncation + 1",
        f"{TRUTHS}::test_truncation_does_not_change_the_inner_solution",
    ),
    Mutant(
        "forget the mixed derivative in the tangent of the gradient",
        "hypergradients/_tangents.py",
        "directions = (*block.point[: len(w)], *block.outer.values())",
        "directions = (*block.point[: len(w)], *(0 * v for v in block.outer.values()))",
        f"{FORWARD}[algebra-adamw]",
    ),
    Mutant(
        "forget the curvature in the tangent of the gradient",
        "hypergradients/_tangents.py",
        "directions = (*block.point[: len(w)], *block.outer.values())",
        "directions = (*(0 * y for y in block.point[: len(w)]), *block.outer.values())",
        f"{FORWARD}[algebra-adamw]",
    ),
    Mutant(
        "forget the tangents of the solver's own hyperparameters",
        "hypergradients/_tangents.py",
        "torch.func.vmap(push)(*block.point, *bent, *block.outer.values())",
        "torch.func.vmap(push)(*block.point, *bent, *(0 * v for v in block.outer.values()))",
        f"{FORWARD}[algebra-nesterov]",
    ),
    Mutant(
        "forget the tangents of the solver's memory",
        "hypergradients/_tangents.py",
        "torch.func.vmap(push)(*block.point,",
        "torch.func.vmap(push)(*(t * (i < len(gradient)) for i, t in enumerate(block.point)),",
        f"{FORWARD}[algebra-nesterov]",
    ),
    Mutant(
        "forget the random signs of orthogonal directions",
        "hypergradients/_directions.py",
        "yield (angles.cos() + angles.sin()) * signs",
        "yield angles.cos() + angles.sin()",
        f"{DIRECTIONS}::test_orthogonal_directions_are_orthogonal_and_isotropic",
    ),
    Mutant(
        "draw orthogonal directions with replacement",
        "hypergradients/_directions.py",
        "torch.randperm(size, generator=generator)",
        "torch.randint(size, (size,), generator=generator)",
        f"{DIRECTIONS}::test_as_many_directions_as_entries_are_exact",
    ),
    Mutant(
        "the same directions at every outer step",
        "hypergradients/_directions.py",
        "(self.seed, self.step, number)",
        "(self.seed, 0, number)",
        f"{DIRECTIONS}::test_equal_seeds_and_steps_give_equal_bytes_and_others_do_not",
    ),
    Mutant(
        "forget to subtract what the control variate expects",
        "hypergradients/_directional.py",
        "alpha=(scalar - expected) / count",
        "alpha=scalar / count",
        f"{DIRECTIONS}::test_as_many_directions_as_entries_are_exact",
    ),
    Mutant(
        "divide by the whole distance only of forward differences",
        "hypergradients/zeroth_order.py",
        "(self.mu * len(signs))",
        "self.mu",
        f"{DIFFERENCES}::test_the_bias_falls_with_its_order",
    ),
    Mutant(
        "drop the information buffer",
        "hypergradients/_fixed_point.py",
        "_add_times(buffer, v.",
        "_add_times(0 * buffer, v.",
        UNDONE,
    ),
    Mutant(
        "do not swap numerator and denominator on the way back",
        "hypergradients/_fixed_point.py",
        "_divide(v, buffer, m, a)",
        "_multiply(v, buffer, m, a)",
        UNDONE,
    ),
    Mutant(
        "forget to put a full buffer aside",
        "hypergradients/_fixed_point.py",
        "if (self._fill[k] + 1) * growth > _FULL:",
        "if False:",
        UNDONE,
    ),
    Mutant(
        "lose the bits of a coarser scale",
        "hypergradients/_fixed_point.py",
        ".bitwise_or_(shifted.cut_off[k])",
        "",
        f"{REVERSIBLE}::test_velocities_of_any_size_are_undone_and_are_those_of_floating_point",
    ),
    Mutant(
        "differentiate the momentum at the velocity after the step",
        "hypergradients/_reversing.py",
        "_tree.leaves(self._exact.velocity())",
        "_tree.leaves(late)",
        f"{REVERSIBLE}::test_hypergradients_equal_plain_autograd[0.5]",
        also=(
            (
                "hypergradients/_reversing.py",
                "self._exact.unmove(",
                "late = self._exact.velocity(); self._exact.unmove(",
            ),
        ),
    ),
    Mutant(
        "do not look where the way back has led",
        "hypergradients/_reversing.py",
        "            self._exact.check_start()\n",
        "",
        f"{REVERSIBLE}::test_gradients_that_differ_when_taken_again_are_an_error",
    ),
    Mutant(
        "differentiate a closed form as if its matrix were constant",
        "closed_form/_solving.py",
        "(-pulled @ found.mT)",
        "(0 * pulled @ found.mT)",
        f"{CLOSED}::test_gradients_equal_differences_of_refits[None-tall-False]",
    ),
    Mutant(
        "exchange the sides of the gradient of sample weights",
        "closed_form/_solving.py",
        "((kernel @ left) * right)",
        "((kernel @ right) * left)",
        f"{CLOSED}::test_gradients_equal_differences_of_refits[None-wide-False]",
    ),
    Mutant(
        "forget the leverage of the intercept",
        "closed_form/ridge_held_out.py",
        "hat = hat + (1 /",
        "hat = hat + 0 * (1 /",
        f"{CLOSED}::test_scikit_learn_agrees",
    ),
    Mutant(
        "forget the weights in the hat matrix",
        "closed_form/ridge_held_out.py",
        "eye - hat * held",
        "eye - hat",
        f"{CLOSED}::test_gradients_equal_differences_of_refits[one-tall-False]",
    ),
    Mutant(
        "leave the held-out samples in the constant",
        "closed_form/_blocks.py",
        "solved = solved - constant *",
        "solved = solved - 0 * constant *",
        f"{CLOSED}::test_leaving_one_out_is_right_where_the_penalty_is_almost_nothing[0.01]",
    ),
]


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything but the package, and has a child for each mutant."""
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_killed(mutant: Mutant, tmp_path: Path, nursery: subprocess.Popen[str]) -> None:
    package = tmp_path / "optuna_hypergrad"
    shutil.copytree(
        ROOT / "optuna_hypergrad", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    for file, old, new in ((mutant.file, mutant.old, mutant.new), *mutant.also):
        source = (package / file).read_text()
        assert source.count(old) == 1, f"{old!r} is not (once) in {file}"
        (package / file).write_text(source.replace(old, new))
    tests = [str(ROOT / test) for test in mutant.killed_by.split()]
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    nursery.stdin.write(json.dumps([str(tmp_path), str(ROOT), *tests]) + "\n")
    nursery.stdin.flush()
    code = int(nursery.stdout.readline())
    said = (tmp_path / "said").read_text()
    assert code == 1, f"survived, or could not run (exit {code}):\n{said[-5000:]}"
    assert " failed" in said


NURSERY = """
import json, os, sys
import numpy, optuna, pytest, scipy.optimize, sklearn.datasets, sqlalchemy, torch

def examine(folder, root, *tests):
    said = os.open(os.path.join(folder, "said"), os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1), os.dup2(said, 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    import optuna_hypergrad
    if not optuna_hypergrad.__file__.startswith(folder):
        sys.exit(f"the tests would see {optuna_hypergrad.__file__}, not the mutant")
    return pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", f"{root}/pyproject.toml", *tests]
    )

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = int(examine(*json.loads(line)))
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
