"""Hyperparameters that are driven against their bounds, by every rule, over every odd kind of range."""

from __future__ import annotations

import functools
import math
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad.outer_run import OuterRun
from optuna_hypergrad.step_rules import make_step_rule
from optuna_hypergrad.studies.leaves import tensor_definition, tensor_start
from optuna_hypergrad.studies.points import PointSpace
from optuna_hypergrad.studies.trajectory import Cursor, advance

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SLOPES = ("plain", "steep", "flat", "mixed", "broken")
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
RULES = ("auto", "trust_region", "lbfgs", "adam")
OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "SGD": (SGD, {"lr": 0.1}),
    "SGD, huge lr": (SGD, {"lr": 1e30}),
    "SGD, absurd lr": (SGD, {"lr": 1e300}),
    "momentum, huge lr": (SGD, {"lr": 1e12, "momentum": 0.9}),
    "Adam, huge lr": (ADAM, {"lr": 1e9}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 10.0}),
}


def _ulps(start: float, count: int) -> float:
    for _ in range(count):
        start = math.nextafter(start, math.inf)
    return start


def _float32_ulps(r: random.Random) -> tuple[float, float]:
    low = np.float32(r.uniform(0.1, 10.0))
    high = np.nextafter(low, np.float32(np.inf), dtype=np.float32)
    return float(low), float(high) + r.choice([0.0, 1e-9, -1e-9])


RANGES: dict[str, Callable[[random.Random], tuple[float, float]]] = {
    "unit": lambda r: (0.0, 1.0),
    "decimal": lambda r: (round(r.uniform(0.01, 0.9), 2), round(r.uniform(1.0, 9.0), 2)),
    "decades": lambda r: (10.0 ** -r.randint(1, 12), 10.0 ** r.randint(0, 12)),
    "negative": lambda r: (-round(r.uniform(0.1, 9.0), 1), round(r.uniform(0.0, 0.7), 1)),
    "integers": lambda r: (float(r.randint(1, 5)), float(r.randint(6, 1000))),
    "large integers": lambda r: (float(2**53 - 1), float(2**53 + 2 * r.randint(1, 9))),
    "ulps": lambda r: (low := r.uniform(0.1, 10.0), _ulps(low, r.randint(1, 4))),
    "float32 ulps": _float32_ulps,
    "point": lambda r: (low := r.uniform(0.1, 10.0), low),
    "denormal": lambda r: (5e-324 * r.randint(1, 9), 1e-310),
    "denormal low": lambda r: (5e-324 * r.randint(1, 9), 1.0),
    "float32 denormal": lambda r: (1e-45 * r.randint(1, 9), 1e-40),
    "small": lambda r: (0.0, 10.0 ** -r.randint(30, 320)),
    "huge": lambda r: (-(10.0 ** r.randint(30, 307)), 10.0 ** r.randint(30, 308)),
    "everything": lambda r: (-1.7e308, 1.7e308),
    "huge low": lambda r: (10.0 ** r.randint(20, 38), 10.0 ** r.randint(39, 308)),
    "half open": lambda r: r.choice([(round(r.uniform(0.1, 1), 1), math.inf), (-math.inf, 0.3)]),
}


@dataclass(frozen=True)
class Case:
    """One range, the rule that moves in it, and the gradients that it gets."""

    kind: str
    log: bool
    dtype: torch.dtype
    optimizer: str
    slope: str
    seed: int

    @classmethod
    def draw(cls, r: random.Random) -> Case:
        return cls(
            r.choice(list(RANGES)),
            r.random() < 0.5,
            r.choice(DTYPES),
            r.choice([*RULES, *OPTIMIZERS]),
            r.choice(SLOPES),
            r.randrange(2**31),
        )

    def factory(self) -> Callable[[Any], torch.optim.Optimizer]:
        """With an ``lr`` that its dtype can hold: torch refuses the others."""
        kind, settings = OPTIMIZERS.get(self.optimizer, (ADAM, {"lr": 0.1}))
        lr = min(settings["lr"], torch.finfo(self.dtype).max)
        return functools.partial(kind, **{**settings, "lr": lr})

    def rule(self) -> Any:
        """What a sampler takes as ``optimizer=``."""
        return self.optimizer if self.optimizer in RULES else self.factory()

    def domains(self) -> dict[str, ohg.Domain]:
        """Of each entry; logarithmic where it can be."""
        r = random.Random(self.seed)
        found = {}
        for name in ("a", "b", "c"):
            kind = self.kind if name == "a" else r.choice(list(RANGES))
            low, high = RANGES[kind](r)
            log = self.log and low > 0 and math.isfinite(high)
            found[name] = ohg.Domain(low, max(low, high), log)
        return found

    def slopes(self) -> Iterator[tuple[float, Callable[[Tensor], Tensor]]]:
        """Values of a loss, and gradients of the shape and dtype of what they are asked for."""
        r = random.Random(self.seed + 1)
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            size = {"plain": 1.0, "steep": 10.0 ** r.randint(5, 300), "flat": 1e-300}.get(
                self.slope
            )
            size = 10.0 ** r.randint(-300, 300) if size is None else size

            def slope(like: Tensor, size: float = size) -> Tensor:
                noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
                found = (noise * size).to(like.dtype)
                if self.slope == "broken" and r.random() < 0.3 and found.numel():
                    found.view(-1)[0] = r.choice([math.nan, math.inf, -math.inf])
                limit = torch.finfo(like.dtype).max
                return found if self.slope == "broken" else found.clamp(-limit, limit)

            yield r.gauss(0.0, 1.0) * min(size, 1e200), slope


def outside(value: Tensor | float, domain: ohg.Domain) -> bool:
    """Whether any entry is not a number in the range, as float64, which holds all of them."""
    entries = torch.as_tensor(value, dtype=torch.float64).reshape(-1).tolist()
    return not all(math.isfinite(v) and domain.low <= v <= domain.high for v in entries)


def start_in(domain: ohg.Domain, dtype: torch.dtype) -> Tensor | None:
    """Three entries in the middle; ``None`` where ``dtype`` has no number in the range."""
    try:
        return tensor_start("t", domain, 3, None, dtype, None)
    except ohg.HyperparameterError:
        numbers = torch.tensor([domain.low, domain.high], dtype=torch.float64).to(dtype).double()
        assert not ((numbers >= domain.low) & (numbers <= domain.high)).any(), domain
        return None


def trajectory_leaves_its_bounds(case: Case, steps: int = 6) -> list[str]:
    """Numbers and tensors along a trajectory: every point that it proposes."""
    domains = case.domains()
    numbers = {n: d for n, d in domains.items() if n != "c" and math.isfinite(d.high - d.low)}
    starts = {n: s for n, d in domains.items() if (s := start_in(d, case.dtype)) is not None}
    tensors = {f"t{n}": tensor_definition(f"t{n}", domains[n], s) for n, s in starts.items()}
    space = PointSpace(numbers, tensors)
    if not space.domains:
        return []
    rule = make_step_rule(case.rule())
    floats = {n: d.midpoint() for n, d in numbers.items()}
    at = {f"t{n}": s for n, s in starts.items()}
    wrong = [f"{n}: starts at {v!r}" for n, v in floats.items() if outside(v, numbers[n])]
    wrong += [f"{n}: starts at {v}" for n, v in at.items() if outside(v, domains[n[1:]])]
    cursor: Cursor | None = None
    for i, (value, slope) in zip(range(steps), case.slopes(), strict=False):
        cursor = advance(
            rule,
            space,
            cursor,
            i,
            floats,
            at,
            value,
            slope(torch.zeros(len(space.names), dtype=torch.float64)).numpy(),
            {n: slope(v) for n, v in at.items()},
        )
        external = space.to_external(cursor.point)
        floats, at = space.float_values(external), space.tensor_values(external)
        wrong += [f"{n}: step {i} at {v!r}" for n, v in floats.items() if outside(v, numbers[n])]
        wrong += [f"{n}: step {i} at {v}" for n, v in at.items() if outside(v, domains[n[1:]])]
        if not all(math.isfinite(x) for x in cursor.state.numbers.values() if type(x) is float):
            wrong.append(f"step {i}: its state has {cursor.state.numbers}")
    return wrong


def run_leaves_its_bounds(case: Case, steps: int = 6) -> list[str]:
    """The outer loop of ``minimize_bilevel``: every point that it goes to and every checkpoint."""
    domains = case.domains()
    at = {n: s for n, d in domains.items() if (s := start_in(d, case.dtype)) is not None}
    if not at:
        return []
    wrong: list[str] = []
    run = OuterRun.start({}, at, domains, case.factory(), warm_start=True)
    for i, (_, slope) in zip(range(steps), case.slopes(), strict=False):
        gradient = {n: slope(v) for n, v in at.items()}
        if not all(bool(torch.isfinite(g).all()) for g in gradient.values()):
            continue  # the estimator has refused it
        failed = not run.advance(gradient, {}, run.state)
        at = run.outer_params
        wrong += [f"{n}: step {i} at {v}" for n, v in at.items() if outside(v, domains[n])]
        tensors, _ = run.snapshot()
        internal = [v for k, v in tensors.items() if k.startswith("internal/")]
        if not all(bool(torch.isfinite(v).all()) for v in internal):
            wrong.append(f"step {i}: its checkpoint holds {internal}")
        if failed:
            break
    return wrong


def study_leaves_its_bounds(case: Case, trials: int = 5) -> list[str]:
    """A whole study in memory: what the objective gets, ``trial.params`` and stored tensors."""
    domains = case.domains()
    numbers = {n: d for n, d in domains.items() if math.isfinite(d.high - d.low)}
    starts = {n: s for n, d in domains.items() if (s := start_in(d, case.dtype)) is not None}
    slopes = case.slopes()
    wrong: list[str] = []

    def check(name: str, value: Any, domain: ohg.Domain, where: str) -> None:
        if outside(value, domain):
            wrong.append(f"{name}: {where} {value!r}")

    @ohg.differentiable
    def objective(trial: Any) -> Any:
        level, slope = next(slopes)
        loss = torch.tensor(level, dtype=torch.float64)
        for n, d in numbers.items():
            x = trial.suggest_float(n, d.low, d.high, log=d.log)
            check(n, x.detach(), d, "given")
            loss = loss + _Slope.apply(x, slope(x.detach()))
        for n, s in starts.items():
            d = domains[n]
            t = trial.suggest_tensor(f"t{n}", 3, d.low, d.high, log=d.log, dtype=case.dtype)
            tree = trial.suggest_tensor_like(f"d{n}", {"w": s}, d.low, d.high, log=d.log)
            for name, leaf in ((f"t{n}", t), (f"d{n}", tree["w"])):
                check(name, leaf.detach(), d, "given")
                loss = loss + _Slope.apply(leaf, slope(leaf.detach()))
        return loss

    sampler = ohg.HypergradientSampler(
        seed=case.seed, optimizer=case.rule(), retention=ohg.Retention(every=1)
    )
    study = optuna.create_study(sampler=sampler)
    with warnings.catch_warnings():  # of Optuna's TPE, for ranges of a few ulps
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="optuna")
        study.optimize(objective, n_trials=trials, catch=ohg.ObjectiveError)
    for trial in study.trials:
        for n, v in trial.params.items():
            check(n, v, numbers[n], "stored")
        if trial.state.name == "COMPLETE" and starts:
            for name, stored in ohg.load_tensors(trial, study=study).items():
                tensor = stored["w"] if name.startswith("d") else stored
                check(name, tensor, domains[name[1:]], "stored")
    return wrong


class _Slope(torch.autograd.Function):
    """Zero, with a given gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return torch.zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


LAYERS = {
    "trajectory": trajectory_leaves_its_bounds,
    "minimize_bilevel": run_leaves_its_bounds,
    "study": study_leaves_its_bounds,
}
