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
PROXIES = "tests/test_proxies.py"
REVERSIBLE = "tests/test_reversible.py"
UNDONE = f"{REVERSIBLE}::test_two_thousand_steps_are_undone_bit_for_bit[0.9]"
IHVP = "tests/test_ihvp.py"
OUTER = "tests/test_minimize_bilevel.py"
EQUILIBRIA = "tests/test_fixed_point.py"
FIRST_ORDER = "tests/test_first_order.py"
EPISODES = "tests/test_episodes.py"
TERMS = "tests/test_gauss_newton_preconditioner.py"
SHAPES = f"{TABLES}::test_estimator_matches_the_truth_or_names_the_mismatch[Implicit-CG-LBFGS-{{}}]"
FORWARD = "tests/test_forward.py::test_forward_mode_equals_plain_autograd"
DIRECTIONS = "tests/test_forward_gradient.py"
LOOKAHEAD = "tests/test_lookahead.py"
OPERATORS = "tests/test_operators.py"
SKETCHES = "tests/test_sketchy_sgd.py"
CURVATURE = "tests/test_curvature.py"
DIFFERENCES = "tests/test_zeroth_order.py"
BROS = "tests/test_bros.py"
FIGURES = "tests/test_visualization.py"
PENALTIES = "tests/test_penalties.py"
PUBLISHING = "tests/test_publishing.py"
SINGLE = "tests/test_single_loop.py"
RIDGE = f"{TABLES}::test_estimator_matches_the_truth_or_names_the_mismatch[Implicit-CG-LBFGS-ridge]"

MUTANTS = [
    Mutant(
        "a figure that is not drawn any more stays as it was",
        "dashboard/plots.py",
        '        if text == NOTHING and not known.get(f"{PREFIX}{name}:0"):',
        "        if text == NOTHING:",
        f"{PUBLISHING}::test_a_figure_that_is_not_drawn_any_more_does_not_stay_as_it_was",
    ),
    Mutant(
        "a note is read before SQLite is locked",
        "stores/_optuna_tables.py",
        "        connection.execute(_NO_UPDATE)",
        "        pass",
        f"{PUBLISHING}::test_nobody_can_write_a_note_while_it_is_written",
    ),
    Mutant(
        "flip the sign of the direct term",
        "hypergradients/_outer_gradients.py",
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
        "torch.add(z, p, alpha=rz / before, out=p)",
        "torch.add(old, p, alpha=rz / before, out=p)",
        f"{TABLES}::test_linear_solver_converges_or_says_why_not[cg-spd0]",
        also=(
            ("ihvp/cg.py", "r.sub_(hp, alpha=alpha)", "old = r.clone(); r.sub_(hp, alpha=alpha)"),
        ),
    ),
    Mutant(
        "return CG's iterate before the last update",
        "ihvp/cg.py",
        "x.add_(p, alpha=alpha)",
        "x, ahead = (x, x + alpha * p) if count == 0 else (ahead, ahead + alpha * p)",
        f"{TRUTHS}::test_cg_iterates_are_krylov_minimizers",
    ),
    Mutant(
        "keep the steps of plain CG under a preconditioner",
        "ihvp/cg.py",
        "alpha = rz / curvature",
        "alpha = rr / curvature",
        f"{TABLES}::test_preconditioner_saves_steps_or_says_why_not[nystrom-power_law0]",
    ),
    Mutant(
        "count the range of the sketch twice",
        "ihvp/nystrom.py",
        ".clamp_min(least) - 1.0 / tail",
        ".clamp_min(least)",
        f"{IHVP}::test_nystrom_is_exact_for_a_matrix_of_its_rank",
    ),
    Mutant(
        "take sums over positions of a convolution for means",
        "ihvp/kfac.py",
        "layer.square / layer.places",
        "layer.square / rows",
        f"{IHVP}::test_kfac_blocks_are_kronecker_products_of_inputs_and_output_curvature",
    ),
    Mutant(
        "forget the 1 of the bias",
        "ihvp/_layers.py",
        "rows.new_ones(len(rows), 1)",
        "rows.new_zeros(len(rows), 1)",
        f"{IHVP}::test_kfac_of_one_layer_with_squared_loss_is_the_inverse[0.1-0.3]",
    ),
    Mutant(
        "forget the curvature of the decay in K-FAC",
        "ihvp/_network.py",
        "undamped(operator)[1] + own",
        "undamped(operator)[1]",
        f"{IHVP}::test_kfac_of_one_layer_with_squared_loss_is_the_inverse[0.1-0.3]",
    ),
    Mutant(
        "make soft directions stiff that the Gauss-Newton terms share in",
        "ihvp/_terms.py",
        "(1 - 2 * held)",
        "(1 - 0 * held)",
        f"{TERMS}::test_targets_add_the_second_derivatives_of_layers[squared]",
    ),
    Mutant(
        "count the Gauss-Newton terms among the second derivatives of layers",
        "ihvp/_terms.py",
        "own = bend - (d * shares[:, :, None, None]).sum(0)",
        "own = bend",
        f"{TERMS}::test_targets_add_the_second_derivatives_of_layers[cross_entropy]",
    ),
    Mutant(
        "keep the last Gauss-Newton term of a sample only",
        "ihvp/_samples.py",
        "rows[: len(d)].addcmul_(d, c[:, None, None])",
        "rows[: len(d)] = d * c[:, None, None]",
        f"{TERMS}::test_all_terms_are_the_damped_gauss_newton_matrix[perceptron-squared-0.3]",
    ),
    Mutant(
        "begin the next linear solve from the solution's negative",
        "hypergradients/implicit.py",
        "tensors[_SOLUTION] = -found.x",
        "tensors[_SOLUTION] = found.x",
        "tests/test_carried_solves.py::test_a_fixed_number_of_steps_gets_nearer_from_the_last_solution",
    ),
    Mutant(
        "rotate a Hessenberg column the wrong way",
        "ihvp/gmres.py",
        "c * entries[i + 1] - s * entries[i]",
        "c * entries[i + 1] + s * entries[i]",
        f"{IHVP}::test_gmres_iterates_have_the_least_residual_in_the_krylov_space",
    ),
    Mutant(
        "forget the second diagonal of MINRES",
        "ihvp/minres.py",
        "v - epsilon_before * w_before - delta * w",
        "v - delta * w",
        f"{IHVP}::test_minres_iterates_are_those_of_gmres",
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
        "compile every solver's step as the first one",
        "hypergradients/compiled_steps.py",
        "self._is_whole = not self._solver.depends_on_index(self._lam)",
        "self._is_whole = True",
        "tests/test_compiled_steps.py::test_steps_that_go_their_own_ways_are_differentiated_as_they_are[OwnDecay-never]",
    ),
    Mutant(
        "keep compiled tapes that are larger than the memory they were given",
        "hypergradients/compiled_steps.py",
        "self._keeps_tapes = all_tapes <= self._tapes_within",
        "self._keeps_tapes = True",
        "tests/test_compiled_steps.py::test_hypergradients_equal_those_of_the_tape[adam]",
    ),
    Mutant(
        "compute products of matrices again on the way back of a compiled tape",
        "hypergradients/cut_after_products.py",
        'if node in back or (node.op == "call_function" and cheap(node)):',
        'if node in back or node.op == "call_function":',
        "tests/test_compiled_steps.py::test_the_way_back_of_a_tape_takes_no_product_again",
    ),
    Mutant(
        "let a plain momentum hand its whole cotangent down",
        "hypergradients/_reversing.py",
        "at.point[:] = [*of_w, *(b.mul_(mu) for b in of_v)]",
        "at.point[:] = [*of_w, *of_v]",
        f"{REVERSIBLE}::test_gradients_reach_the_initialization_through_solve",
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
        'torch.randperm(size, generator=generator, device="cpu")',
        'torch.randint(size, (size,), generator=generator, device="cpu")',
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
        "end the way back at the start of any stretch",
        "hypergradients/_rewind.py",
        "start == 0 and not tapes",
        "not tapes",
        "tests/test_unrolling.py::test_a_last_pullback_is_the_same_and_leaves_the_initialization_out[0.1-9-sqrt]",
    ),
    Mutant(
        "steps of an inner solve share the dict of outer parameters",
        "inner/_base.py",
        "problem.inner_objective(dict(at), dict(outer_params), batch)",
        "problem.inner_objective(dict(at), outer_params, batch)",
        "tests/test_unrolling.py::test_objectives_may_give_other_tensors_to_the_names_that_they_are_given[unroll-never-False]",
    ),
    Mutant(
        "leave the information buffer out of the way back in doubles",
        "hypergradients/_fixed_doubles.py",
        "add_times(v, buffer, n, out=v)",
        "add_times(v, 0 * buffer, n, out=v)",
        f"{REVERSIBLE}::test_narrow_numbers_are_those_of_integers_in_doubles[0.5]",
    ),
    Mutant(
        "stay in doubles where the inner parameters have outgrown them",
        "hypergradients/_fixed_point.py",
        "            self._go_on_in_integers()\n",
        "            pass\n",
        f"{REVERSIBLE}::test_what_grows_out_of_doubles_goes_on_in_integers_and_back",
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
        "hand out the fast weights of Lookahead",
        "inner/lookahead.py",
        "return moved, after, value, gradient",
        "return fast, after, value, gradient",
        f"{LOOKAHEAD}::test_between_two_slow_steps_the_inner_params_stand_still",
    ),
    Mutant(
        "begin each period of Lookahead at its old fast weights",
        "inner/lookahead.py",
        "begins = phase == 0",
        "begins = phase < 0",
        f"{LOOKAHEAD}::test_the_variance_on_a_noisy_quadratic_is_that_of_the_formula[0.5-5-0.3]",
    ),
    Mutant(
        "forget that probabilities add up to one in the Fisher information",
        "gauss_newton.py",
        "(p * x).sum(1, keepdim=True) if classes else p * x",
        "0.0 if classes else p * x",
        f"{OPERATORS}::test_the_fisher_information_is_the_expectation_that_it_is_named_for",
    ),
    Mutant(
        "sum over batches in place of their mean",
        "operators.py",
        'torch.stack([scalar(v, "inner_objective") for v in values]).mean()',
        'torch.stack([scalar(v, "inner_objective") for v in values]).sum()',
        f"{OPERATORS}::test_all_parts_together_are_the_whole[Fisher]",
    ),
    Mutant(
        "leave directions outside of the sketch as they are",
        "inner/sketchy_sgd.py",
        "rest = self.damping**exponent",
        "rest = 1.0",
        f"{SKETCHES}::test_powers_of_the_preconditioner_are_those_of_its_matrix",
    ),
    Mutant(
        "forget the shift of the core of a sketch",
        "_nystrom.py",
        "shifted = self.products.add(self.test, alpha=shift)",
        "shifted = self.products.add(self.test, alpha=1e9 * shift)",
        f"{SKETCHES}::test_the_sketch_of_a_matrix_of_its_rank_is_exact[dtype0]",
    ),
    Mutant(
        "forget what batches add to the largest eigenvalue",
        "curvature_report.py",
        "return bare + added / bare if bare > edge",
        "return bare if bare > edge",
        f"{CURVATURE}::test_the_largest_eigenvalue_at_other_batch_sizes_is_predicted[0]",
    ),
    Mutant(
        "do not look where the way back has led",
        "hypergradients/_reversing.py",
        "            self._exact.check_start()\n",
        "",
        f"{REVERSIBLE}::test_gradients_that_differ_when_taken_again_are_an_error",
    ),
    Mutant(
        "drop the relaxation from the phantom gradient",
        "equilibrium/phantom.py",
        "alpha=float(self.relaxation)",
        "alpha=1.0",
        f"{EQUILIBRIA}::test_phantom_gradients_are_their_formula",
    ),
    Mutant(
        "one term too many in the phantom gradient",
        "equilibrium/phantom.py",
        "Neumann(self.num_steps - 1,",
        "Neumann(self.num_steps,",
        f"{EQUILIBRIA}::test_phantom_gradients_are_their_formula",
    ),
    Mutant(
        "do not relax the unrolled steps",
        "fixed_point.py",
        "torch.lerp(v, image[k], tau) if tau < 1",
        "image[k] if tau < 1",
        f"{EQUILIBRIA}::test_phantom_gradients_are_their_formula",
    ),
    Mutant(
        "pull the cotangent through the map without a solve",
        "fixed_point.py",
        "return operator.layout.split(found.x)",
        "return operator.layout.split(b)",
        f"{EQUILIBRIA}::test_gradients_reach_parameters_inputs_and_closures",
    ),
    Mutant(
        "forget the identity in the adjoint system",
        "equilibrium/adjoint.py",
        "        return vector - self._pulled(vector)",
        "        return -self._pulled(vector)",
        f"{EQUILIBRIA}::test_phantom_gradients_are_their_formula",
    ),
    Mutant(
        "combine points and forget their residuals in Anderson",
        "equilibrium/anderson.py",
        "moved.baddbmm_(gamma, changes, alpha=-self.relaxation).squeeze_(1)",
        "moved.squeeze_(1)",
        f"{EQUILIBRIA}::test_anderson_with_enough_memory_ends_after_as_many_steps_as_dimensions",
    ),
    Mutant(
        "differentiate w alone and forget the velocity",
        "hypergradients/fixed_point_implicit.py",
        "return found | {",
        "return found or {",
        f"{EQUILIBRIA}::test_phantom_of_momentum_descent_is_its_unrolling_from_the_solution",
    ),
    Mutant(
        "divide by half of the distance between the ends of a difference",
        "hypergradients/sama.py",
        "outer[k] = (b - a) / (2 * eps)",
        "outer[k] = (b - a) / eps",
        f"{FIRST_ORDER}::test_sama_is_its_formula",
    ),
    Mutant(
        "forget the second moment in the adaptation",
        "hypergradients/sama.py",
        "lambda _: (value, gradient), at, lam, last.state, last.index",
        "lambda _: (value, gradient), at, lam, solver.init(at), last.index",
        f"{FIRST_ORDER}::test_the_adaptation_is_the_derivative_of_the_step_by_the_gradient",
    ),
    Mutant(
        "flip the sign of the adaptation",
        "hypergradients/sama.py",
        "return {k: -p for k, p in",
        "return {k: p for k, p in",
        f"{FIRST_ORDER}::test_sama_is_its_formula",
    ),
    Mutant(
        "do not look for functions that leave no trace in the gradient",
        "_twice.py",
        "return code is not None and code is _MARK",
        "return False",
        f"{FIRST_ORDER}::test_all_others_refuse_what_has_no_second_derivative",
    ),
    Mutant(
        "forget the implicit factor of pre-training",
        "hypergradients/implicit.py",
        "return found, graph.cross_vjp(found.x.neg_()), graph",
        "return found, graph.cross_vjp(right.neg_()), graph",
        SHAPES.format("two_stage"),
        also=(
            (
                "hypergradients/implicit.py",
                "        found = linear_solve(\n",
                "        right = b.clone()\n        found = linear_solve(\n",
            ),
        ),
    ),
    Mutant(
        "forget the direct term of fine-tuning",
        "two_stage.py",
        "            outer_params,\n            solver=self.solver,",
        "            {k: v.detach() for k, v in outer_params.items()},\n            solver=self.solver,",
        SHAPES.format("two_stage"),
    ),
    Mutant(
        "forget that fine-tuning starts from pre-training",
        "two_stage.py",
        "            begun,\n",
        "            {k: v.detach() for k, v in begun.items()},\n",
        SHAPES.format("two_stage"),
    ),
    Mutant(
        "add the identity to the operator of iMAML",
        "operators.py",
        "        return self.graph.hvp(vector, out)",
        "        return self.graph.hvp(vector, out) + vector",
        SHAPES.format("episodes"),
    ),
    Mutant(
        "the sum of the tasks in place of their mean",
        "episodes.py",
        'count, "outer_objective").mean()',
        'count, "outer_objective").sum()',
        SHAPES.format("episodes"),
    ),
    Mutant(
        "forget the half of the proximal term",
        "proximal.py",
        "0.5 * strength * torch.stack",
        "1.0 * strength * torch.stack",
        SHAPES.format("episodes"),
    ),
    Mutant(
        "forget that the tasks start from the shared parameters",
        "episodes.py",
        "theta = outer_params if counts else",
        "theta = outer_params if False else",
        f"{EPISODES}::test_unrolled_steps_from_the_shared_start_are_maml[False]",
    ),
    Mutant(
        "differentiate the start at a solution",
        "hypergradients/_base.py",
        "problem = problem.without_start()",
        "problem = problem",
        f"{EPISODES}::test_implicit_uses_the_proximal_term_alone",
    ),
    Mutant(
        "the tasks of the first step at every step",
        "outer.py",
        "                    problem.at(run.step),",
        "                    problem.at(0),",
        f"{EPISODES}::test_each_outer_step_has_other_tasks_and_the_loss_falls",
    ),
    Mutant(
        "the first start at every step",
        "outer_start.py",
        "    found = inner_params(step)\n    check_params",
        "    found = inner_params(0)\n    check_params",
        f"{OUTER}::test_each_outer_step_may_have_a_start_of_its_own",
    ),
    Mutant(
        "solve the linear system of a single loop for the opposite",
        "hypergradients/_single_loop.py",
        "residual, scale = product - cotangent",
        "residual, scale = product + cotangent",
        f"{SINGLE}::test_all_directions_are_taken_at_the_same_point[soba]",
    ),
    Mutant(
        "flip the sign of the indirect term in a single loop",
        "hypergradients/_single_loop.py",
        "None if c is None else -c",
        "None if c is None else c",
        f"{SINGLE}::test_all_directions_are_taken_at_the_same_point[soba]",
    ),
    Mutant(
        "weigh the average of a single loop the wrong way round",
        "hypergradients/_single_loop.py",
        "torch.lerp(h, d, theta)",
        "torch.lerp(d, h, theta)",
        f"{SINGLE}::test_all_directions_are_taken_at_the_same_point[ma_soba]",
    ),
    Mutant(
        "never shorten the steps of a linear system",
        "hypergradients/_pace.py",
        "if growth <= _TOO_MUCH:",
        "if True:",
        f"{SINGLE}::test_steps_under_which_the_linear_system_diverges_are_shortened[21.0]",
    ),
    Mutant(
        "forget what a table remembers of a batch",
        "hypergradients/saba.py",
        "found[name] = mean + change",
        "found[name] = mean + rows[name]",
        f"{SINGLE}::test_tables_of_past_gradients_take_the_noise_away",
    ),
    Mutant(
        "do not write what a batch says into its table",
        "hypergradients/saba.py",
        "table[index] = rows[name]",
        "pass",
        f"{SINGLE}::test_tables_of_past_gradients_take_the_noise_away",
    ),
    Mutant(
        "take the outer gradient of a penalty at the wrong one of two solutions",
        "hypergradients/f2sa.py",
        "f = at(above, True)",
        "f = at(z, True)",
        f"{PENALTIES}::test_penalties_of_a_coupled_outer_objective_equal_the_closed_form",
    ),
    Mutant(
        "forget the half of central penalties",
        "hypergradients/f2sa.py",
        "scale = 0.5 * s if self.central else s",
        "scale = s",
        f"{PENALTIES}::test_penalized_solutions_equal_the_closed_form[True]",
    ),
    Mutant(
        "drop the inner gradient at the inner solution from a penalty",
        "hypergradients/_slopes.py",
        "found[k] = x if y is None else x - y",
        "found[k] = x",
        f"{PENALTIES}::test_penalized_solutions_equal_the_closed_form[False]",
    ),
    Mutant(
        "let the barrier push back where the inner objective falls by itself",
        "hypergradients/bome.py",
        "return max(0.0, (wanted - along) / size)",
        "return (wanted - along) / size",
        f"{PENALTIES}::test_both_variables_move_from_the_same_point[inner-bome]",
    ),
    Mutant(
        "measure what the inner objective has fallen by on another batch than it fell on",
        "hypergradients/_penalty.py",
        "batch = problem.inner_batch(count)",
        "batch = problem.inner_batch(count + 1)",
        f"{PENALTIES}::test_both_variables_move_from_the_same_point[inner-bome]",
    ),
    Mutant(
        "end a run of a penalty method with a solve that takes its y from the outer objective",
        "hypergradients/_penalty.py",
        'return self.returns == "inner"',
        "return True",
        f"{PENALTIES}::test_a_run_ends_with_the_variable_that_it_was_asked_for[f2sa]",
    ),
    Mutant(
        "sketch a matrix that was to be left whole",
        "hypergradients/_sketches.py",
        "r = None if name in whole else rank_of(label, name, block.shape, rank)",
        "r = rank_of(label, name, block.shape, rank)",
        "tests/test_bros.py::test_matrices_that_are_named_stay_whole",
    ),
    Mutant(
        "perturb the hyperparameters of a proxy to one side only",
        "hypergradients/_proxy.py",
        "for d in (delta, -delta)",
        "for d in (delta, delta)",
        f"{PROXIES}::test_the_response_tends_to_the_implicit_one[delta_stn]",
    ),
    Mutant(
        "the same perturbation for every fit of a proxy",
        "hypergradients/_proxy.py",
        "around.drawn(self.seed, 0, index)",
        "around.drawn(self.seed, 0, 0)",
        f"{PROXIES}::test_the_response_tends_to_the_implicit_one[hypernetwork]",
    ),
    Mutant(
        "drop the chain rule of a perturbed logarithm",
        "hypergradients/_around.py",
        "k: part / v.detach() if k in self.log else part",
        "k: part",
        f"{PROXIES}::test_one_gate_is_enough_for_one_hyperparameter[1-log1]",
    ),
    Mutant(
        "differentiate a closed form as if its matrix were constant",
        "closed_form/_solving.py",
        "(-pulled @ found.mT)",
        "(0 * pulled @ found.mT)",
        f"{CLOSED}::test_gradients_equal_differences_of_refits[one-tall-False]",
    ),
    Mutant(
        "forget that the residual depends on the coefficients",
        "closed_form/_fitting.py",
        "v.mT - by_t @ w.mT",
        "v.mT",
        f"{CLOSED}::test_gradients_equal_differences_of_refits[None-tall-False]",
    ),
    Mutant(
        "exchange the sides of the gradient of sample weights",
        "closed_form/_solving.py",
        "((kernel @ left) * right)",
        "((kernel @ right) * left)",
        f"{CLOSED}::test_gradients_equal_differences_of_refits[one-wide-False]",
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
    Mutant(
        "sketch the Hessian on both sides with one sketch",
        "hypergradients/bros.py",
        "return along(v, True)",
        "return along({k: s.up(s.down(v[k])) for k, s in sketches.items()}, True)",
        f"{BROS}::test_the_action_of_the_hessian_is_unbiased[one_sided-gaussian-2]",
    ),
    Mutant(
        "forget the second signs of the probe",
        "hypergradients/_sketched_action.py",
        "(x - e[k] * second.product[k])",
        "(x - second.product[k])",
        f"{BROS}::test_the_action_of_the_hessian_is_unbiased[bi_probe-gaussian-3]",
    ),
    Mutant(
        "forget the factor of the probe",
        "hypergradients/_sketched_action.py",
        "correction = rank / (rank - 1)",
        "correction = 1.0",
        f"{BROS}::test_the_action_of_the_hessian_is_unbiased[bi_probe-rademacher-2]",
    ),
    Mutant(
        "take the same sketch for both sides of two",
        "hypergradients/bros.py",
        "two_sketch(along, v, self._drawn(count, 1, inner_params))",
        "two_sketch(along, v, sketches)",
        f"{BROS}::test_the_action_of_the_hessian_is_unbiased[two_sketch-orthonormal-2]",
    ),
    Mutant(
        "hold on to the gradients of all blocks",
        "hypergradients/_sketches.py",
        "        leaf.grad = None\n",
        "",
        f"{BROS}::test_no_gradient_of_more_than_one_block_lives_at_a_time",
    ),
    Mutant(
        "hold on to products in subspaces while the next inner parameters are made",
        "hypergradients/bros.py",
        "gap = product.pop(k) - cotangent.pop(k)",
        "gap = product[k] - cotangent[k]",
        f"{BROS}::test_products_are_gone_before_the_next_inner_params_come",
    ),
    Mutant(
        "count hypergradients that a bound holds back",
        "visualization/_hypergradient_norms.py",
        "total += 0.0 if held else slope**2",
        "total += slope**2",
        f"{FIGURES}::test_norms_are_those_of_the_gradient_in_natural_steps[plotly-minimize]",
    ),
    Mutant(
        "count ties of sample weights in full",
        "visualization/_sample_weights.py",
        "(ends - (counts - 1) / 2)",
        "(ends)",
        "tests/test_visualization_tensors.py::test_auroc_is_that_of_scikit_learn",
    ),
    Mutant(
        "publish the norm of what a bound holds back",
        "trial_attributes.py",
        "norm = torch.linalg.vector_norm(slope.masked_fill(blocked, 0.0), dtype=torch.float64)",
        "norm = torch.linalg.vector_norm(slope, dtype=torch.float64)",
        f"{PUBLISHING}::test_norm_leaves_out_what_a_bound_holds_back",
    ),
    Mutant(
        "publish a study as it was before its last trial",
        "dashboard/publishing.py",
        "trials[ending[0]] = _optuna.ended(trials[ending[0]], *ending[1:])",
        "pass",
        f"{PUBLISHING}::test_note_says_what_the_study_holds",
    ),
    Mutant(
        "put a note in place of the user's",
        "dashboard/note.py",
        'return f"{body.rstrip()}\\n\\n{part}" if body.strip() else part',
        "return part",
        f"{PUBLISHING}::test_note_of_others_stays",
    ),
    Mutant(
        "load tensors of the step before",
        "studies/tensors.py",
        "return _of_trial(study, steps[step], name, store)",
        "return _of_trial(study, steps[max(step - 1, 0)], name, store)",
        "tests/test_loading.py::test_a_step_is_one_of_the_same_trajectory[memory]",
    ),
    Mutant(
        "take support vectors at their bounds for fixed",
        "sklearn_adapters/_support_vectors.py",
        "held = torch.where(mask, torch.as_tensor(beta), bound)",
        "held = torch.where(mask, torch.as_tensor(beta), bound.detach())",
        "tests/test_sklearn_adapters.py::test_hypergradients_are_those_of_refits[SVC-rbf-False]",
    ),
    Mutant(
        "forget the squares in the elastic net",
        "sklearn_adapters/_sparse_linear.py",
        "slope = slope + l1 * torch.sign(w) + l2 * w",
        "slope = slope + l1 * torch.sign(w) + (l2 * w).detach()",
        "tests/test_sklearn_adapters.py::test_hypergradients_are_those_of_refits[ElasticNet-plain-False]",
    ),
    Mutant(
        "remember distances of samples that have moved",
        "sklearn_adapters/_kernels.py",
        "if kept is None or any(a is not b for a, b in zip(kept[0], given, strict=True)):",
        "if kept is None:",
        "tests/test_sklearn_adapters.py::test_data_and_weights_have_slopes_too[KernelRidge-rbf]",
    ),
    Mutant(
        "judge a network's hyperparameters by the samples that guide them",
        "sklearn_adapters/_network_estimator.py",
        "guide, judge = held[first], held[second]",
        "guide, judge = held, held",
        "tests/test_sklearn_networks.py::test_those_that_judge_many_are_not_those_that_guide[per_weight-False]",
    ),
    Mutant(
        "hold back samples from a few hyperparameters",
        "sklearn_adapters/_network_estimator.py",
        "and count * _SAMPLES_EACH > len(held)",
        "and count > 0",
        "tests/test_sklearn_networks.py::test_those_that_judge_many_are_not_those_that_guide[per_layer-True]",
    ),
    Mutant(
        "train inner folds on what the outer fold is judged by",
        "sklearn_adapters/_nested.py",
        "part = np.intersect1d(other_train, seen), np.intersect1d(other_test, seen)",
        "part = np.setdiff1d(other_train, other_test), np.intersect1d(other_test, seen)",
        "tests/test_sklearn_nested.py::test_inner_folds_keep_to_the_outer_ones",
    ),
    Mutant(
        "refit without the weights of samples that were found",
        "sklearn_adapters/_weighting.py",
        "self._fit_params[self._argument] = own * learned",
        "self._fit_params[self._argument] = own + 0 * learned",
        "tests/test_sklearn_vectors.py::test_weights_of_samples_are_in_fits_and_the_refit_but_not_in_scores",
    ),
    Mutant(
        "weigh the features of the training samples only",
        "sklearn_adapters/_vectors.py",
        "x_test=fold.x_test * each)",
        "x_test=fold.x_test)",
        "tests/test_sklearn_vectors.py::test_the_loss_of_weights_of_features_is_the_score_of_a_plain_pipeline[KernelRidge]",
    ),
    Mutant(
        "leave the process to the first of two searches that ends",
        "sklearn_adapters/_process_wide.py",
        "if not self._before:",
        "if True:",
        "tests/test_sklearn_search.py::test_searches_that_overlap_leave_the_process_as_it_was",
    ),
    Mutant(
        "score a check without the weights that the score has",
        "sklearn_adapters/_following.py",
        "counted[SAMPLE_WEIGHT] = weights[test]",
        "counted[SAMPLE_WEIGHT] = None",
        "tests/test_sklearn_search.py::test_a_check_counts_the_weights_that_the_score_has",
    ),
    Mutant(
        "take a logistic Hessian for that of each class alone",
        "sklearn_adapters/_newton_cg.py",
        "found: Tensor = self.x.mT @ (z - self.probabilities * z.sum(1, keepdim=True))",
        "found: Tensor = self.x.mT @ (z - self.probabilities * z)",
        "tests/test_sklearn_speed.py::test_products_with_the_hessian_find_what_the_whole_hessian_finds[4-True-True]",
    ),
    Mutant(
        "keep a decomposition of samples whose weights are others",
        "sklearn_adapters/_shrinkage.py",
        'memory, "tridiagonal", key, lambda: Tridiagonal.of(Moments.of(fold, intercept))',
        'memory, "tridiagonal", (fold.x_train is None,), lambda: Tridiagonal.of(Moments.of(fold, intercept))',
        "tests/test_sklearn_speed.py::test_a_reduction_is_that_of_the_samples_it_is_asked_for",
    ),
    Mutant(
        "let the worse half of the starts go on",
        "sklearn_adapters/_descent.py",
        "left, first = sorted(ranked[: (len(left) + 1) // 2]), last",
        "left, first = sorted(ranked[-((len(left) + 1) // 2) :]), last",
        "tests/test_sklearn_speed.py::test_starts_race_over_the_folds[5-10]",
    ),
    Mutant(
        "begin where the loss is flat",
        "sklearn_adapters/_descent.py",
        "if best is None or not is_flat:",
        "if best is None or is_flat:",
        "tests/test_sklearn_multistart.py::test_a_scan_goes_on_where_the_loss_is_flat",
    ),
    Mutant(
        "look again near what was visited",
        "sklearn_adapters/_descent.py",
        "if g > near]",
        "if g >= 0]",
        "tests/test_sklearn_multistart.py::test_further_scans_look_elsewhere",
    ),
    Mutant(
        "begin at the nearest point where all is known",
        "sklearn_adapters/_descent.py",
        "points[gaps.index(max(gaps))]",
        "points[gaps.index(min(gaps))]",
        "tests/test_sklearn_multistart.py::test_where_all_is_known_the_farthest_point_is_next",
    ),
    Mutant(
        "count starts that were cut off",
        "sklearn_adapters/_objective.py",
        "return trial.state != TrialState.FAIL or has_failed(trial)",
        "return True",
        "tests/test_sklearn_multistart.py::test_a_search_that_was_cut_in_a_scan_goes_on_to_the_bit[scanned_elsewhere]",
    ),
    Mutant(
        "scan the same points again",
        "sklearn_adapters/_descent.py",
        "begin = NUM_SCANNED + (number - 1) * each",
        "begin = NUM_SCANNED + 0 * each",
        "tests/test_sklearn_multistart.py::test_further_scans_look_elsewhere",
    ),
    Mutant(
        "a start is given once",
        "studies/plan.py",
        'or self.start == "given"',
        "or False",
        "tests/test_sklearn_multistart.py::test_a_start_is_given_every_time",
    ),
    Mutant(
        "creep on",
        "step_rules/trust_region.py",
        """if n["best"] < marked - self.rtol * abs(marked):""",
        """if n["best"] < marked:""",
        "tests/test_sklearn_multistart.py::test_what_creeps_has_ended[0.001-True]",
    ),
    Mutant(
        "untie on what a few folds agree on",
        "sklearn_adapters/_nested.py",
        "return float(each.mean()), max(between, total**0.5 / count)",
        "return float(each.mean()), between",
        "tests/test_sklearn_nested.py::test_folds_that_agree_by_chance_do_not_untie_where_samples_differ_widely[0.5-None]",
    ),
    Mutant(
        "count a sample that several folds test as several",
        "sklearn_adapters/_nested.py",
        "total = float(np.square(np.sum(differences, 0)).sum())",
        "total = float(np.square(differences).sum())",
        "tests/test_sklearn_nested.py::test_samples_that_several_folds_test_are_not_counted_as_others",
    ),
    Mutant(
        "untie on a gain of one standard error",
        "sklearn_adapters/_nested.py",
        "return excess > float(stdtrit(num_folds - 1, _CONFIDENCE)) * error",
        "return excess > error",
        "tests/test_sklearn_nested.py::test_the_choice_is_the_stiffest_of_the_best_if_it_is_surely_better_than_tied[losses3-None]",
    ),
    Mutant(
        "let all samples of a validation set count alike",
        "sklearn_adapters/_network_problem.py",
        "return (batch[3] * self.loss(self.outputs(w, lam, batch), batch[1])).mean()",
        "return self.loss(self.outputs(w, lam, batch), batch[1]).mean()",
        "tests/test_sklearn_network_weights.py::test_weights_are_numbers_of_repetitions[HypergradientRegressor-one]",
    ),
    Mutant(
        "scale targets as if all samples counted alike",
        "sklearn_adapters/network.py",
        "self._mean = float((weights * y).mean())",
        "self._mean = float(y.mean())",
        "tests/test_sklearn_network_weights.py::test_weights_are_numbers_of_repetitions[HypergradientRegressor-one]",
    ),
    Mutant(
        "begin each descent of vectors where the first one has begun",
        "sklearn_adapters/_restarts.py",
        'scaled = value / factor if vector.place == "targets" else value * factor',
        "scaled = value",
        "tests/test_sklearn_restarts.py::test_a_penalty_per_target_is_looser_where_it_is_smaller",
    ),
    Mutant(
        "the cubic's minimum from the wrong root",
        "step_rules/_line.py",
        "t = -c / (b + root) if b > 0",
        "t = -c / (b - root) if b > 0",
        "tests/test_line.py::test_the_minimum_of_a_cubic_is_one_step_away",
    ),
    Mutant(
        "forget one of the two places of a weight of a feature",
        "sklearn_adapters/_shrinkage.py",
        "np.divide(2 * alpha * product, scales,",
        "np.divide(alpha * product, scales,",
        "tests/test_sklearn_speed.py::test_moments_give_every_weight_of_features[1-True-tall]",
    ),
    Mutant(
        "take a rough fit of the scan for one of a trial",
        "sklearn_adapters/_cross_validated.py",
        "elif fit.exact and len(fold.x_train) <= _KEPT_SAMPLES:",
        "elif len(fold.x_train) <= _KEPT_SAMPLES:",
        "tests/test_sklearn_speed.py::test_a_rough_fit_of_the_scan_is_no_fit_of_a_trial",
    ),
    Mutant(
        "take the secant of one hyperparameter upside down",
        "step_rules/_quadratic.py",
        "slope = changes[-1] / steps[-1]",
        "slope = steps[-1] / changes[-1]",
        "tests/test_step_rules.py::test_the_model_of_arrays_is_that_of_tensors[1]",
    ),
    Mutant(
        "a lower value whose slope points back ends no interval",
        "step_rules/_line.py",
        "if worse or new.slope * (new.at - kept.at) >= 0:",
        "if worse:",
        "tests/test_line.py::test_a_single_hyperparameter_takes_fewer_evaluations_than_by_slopes_alone",
    ),
    Mutant(
        "a kink is taken for noise",
        "step_rules/trust_region.py",
        "doubtful &= not (line and before <= -gain <= after)",
        "doubtful &= True",
        "tests/test_line.py::test_a_kink_is_not_taken_for_noise",
    ),
    Mutant(
        "an interval outlives a step into a hole",
        "step_rules/trust_region.py",
        "        _line.forget(n)\n\n    def _learn",
        "\n    def _learn",
        "tests/test_line.py::test_a_step_into_a_hole_of_the_interval_is_not_taken_again",
    ),
    Mutant(
        "the trajectory begun last goes on first, however bad",
        "studies/racing.py",
        "return min(begun, key=final_value)",
        "return begun[0]",
        "tests/test_sklearn_search.py::test_a_few_choices_are_all_looked_at_first_and_the_best_is_gone_on_with",
    ),
    Mutant(
        "leave a product of few summands to BLAS",
        "hypergradients/matrix_products.py",
        "_MANY = 11",
        "_MANY = 10",
        f"{TRUTHS}::test_products_of_few_summands_become_sums",
    ),
    Mutant(
        "forget what is added to a product that is rewritten",
        "hypergradients/matrix_products.py",
        "product = _call(graph, _aten.add.Tensor, product, added)",
        "product = product",
        f"{TRUTHS}::test_products_of_few_summands_become_sums",
    ),
    Mutant(
        "take a step whose settings are hyperparameters for a linear one",
        "inner/heavy_ball.py",
        "return type(self) is HeavyBall and self.has_constant_settings()",
        "return type(self) is HeavyBall",
        "tests/test_forward.py::test_forward_mode_equals_plain_autograd",
    ),
    Mutant(
        "walk back through convolutions row by row",
        "kept_graph.py",
        "alive = iter(torch.func.vmap(pull)(*cotangents))",
        "alive = iter([torch.stack(c) for c in zip(*[pull(*r) for r in zip(*cotangents)])])",
        "tests/test_compiled_tangents.py::test_convolutions_are_batched",
    ),
    Mutant(
        "try at each step what has failed before",
        "kept_graph.py",
        "self._ways.remove(way)",
        "pass",
        "tests/test_forward.py::test_a_way_to_batch_that_has_failed_is_tried_once_a_solve",
    ),
    Mutant(
        "mix up rows and columns of a closed form",
        "closed_form/_solving.py",
        "t.reshape(*t.shape[:-1], -1, rows) for",
        "t.reshape(*t.shape[:-1], rows, -1).mT for",
        f"{CLOSED}::test_rows_of_second_derivatives_are_those_of_one_at_a_time[ridge-2]",
    ),
    Mutant(
        "make what the library needs on torch's default device",
        "hypergradients/_directions.py",
        'torch.arange(size, device="cpu")',
        "torch.arange(size)",
        "tests/test_default_device.py::test_estimator",
    ),
    Mutant(
        "forget at what scale velocities were that have died out",
        "hypergradients/_fixed_point.py",
        "if self._v_bound > 0 or any(bool(v.any()) for v in self._v.values()):",
        "if self._v_bound > 0:",
        f"{REVERSIBLE}::test_velocities_that_have_died_out_may_come_back",
    ),
    Mutant(
        "leave hooks off where the compiler has given up",
        "hypergradients/compiled.py",
        "if enabled:",
        "if not enabled:",
        "tests/test_compiled_tangents.py::test_after_a_refusal_all_is_as_before",
    ),
    Mutant(
        "look once at steps that a schedule makes different",
        "hypergradients/_tangents.py",
        "self._solver.has_schedule() or ",
        "",
        "tests/test_compiled_tangents.py::test_steps_that_are_alike_are_looked_at_once",
    ),
    Mutant(
        "tune a network from a weak decay alone",
        "sklearn_adapters/_network_training.py",
        "starts = {decay, min(_STRONGER * decay, bounds[1])} if schedule.patience else {decay}",
        "starts = {decay}",
        "tests/test_sklearn_networks.py::test_where_samples_are_few_a_strong_decay_is_tried_too",
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
import numpy, optuna, pytest, scipy.optimize, sklearn.datasets, sqlalchemy, torch, torch._dynamo, torch._inductor.compile_fx

def examine(folder, root, *tests):
    said = os.open(os.path.join(folder, "said"), os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1), os.dup2(said, 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    import optuna_hypergrad
    if not optuna_hypergrad.__file__.startswith(folder):
        sys.exit(f"the tests would see {optuna_hypergrad.__file__}, not the mutant")
    return pytest.main(
        ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:hypothesispytest", "-c", f"{root}/pyproject.toml", *tests]
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
