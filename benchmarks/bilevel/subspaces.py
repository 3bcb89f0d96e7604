"""MA-SOBA against BROS where the lower level has at least 20 million weights: memory, time, and what is learned.

* ``mlp``, ``convnet``: which labels of MNIST are wrong?
* ``mixture``: how much of each of three texts, one of them corrupted, should a transformer read?
* ``representation``: features of MNIST below an MLP;
* ``vit``: which labels of CIFAR-10 (JPEG copy) are wrong?

Both methods have the same start, batches, number of steps and Adam on the hyperparameters, and plain descent on the weights with step
sizes that fall linearly to zero. Those of MA-SOBA were chosen on networks of an eighth to a third of the width (each layer is
divided by the root of its inputs, so that a step size does at all widths). BROS has the same ones over its rank: it multiplies
them by ``r/m``, and what is left is the full step size along an unbiased gradient; that works where ``r`` is well above the
number of samples in a batch (or tokens, or positions). Where it is not, ``factor`` shortens them. In the transformer of the
mixture embedding, places and the last layer, which are narrow, are left whole.

Each run has a process of its own, with one thread. Memory is the peak (``VmHWM``) over all steps above what is resident before the
first one, when data and ``w_0`` are there, as in ``single_loop_memory.py``; time is that of the CPU.

    python benchmarks/bilevel/subspaces.py --data DIR [--tasks mlp vit]    # DIR holds mnist/, cifar10_jpeg/, tinyshakespeare/, ...
    python benchmarks/bilevel/subspaces.py --data DIR --scale 0.125 --stored /tmp/small.json    # a minute or two

Runs are kept in ``--stored`` as they end, and not done again. A table and a figure are written beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from subspace_report import write
from subspace_tasks import Task, cleaning, mixture, representation, vit

import optuna_hypergrad as ohg
from optuna_hypergrad.hypergradients._sketches import SketchLaw

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from single_loop_memory import resident  # noqa: E402


@dataclass(frozen=True)
class Setting:
    """How a task is run.

    Args:
        make: The task, of ``(data, width, seed, batch)``.
        batch: Samples, or passages of each text.
        step_size, step_size_v: Of ``w`` and ``v`` in MA-SOBA.
        lr: Of Adam on the hyperparameters.
        rank: Of BROS, whose step sizes are those above times ``factor / rank``.
        law: Of its subspaces.
        whole: Blocks that it leaves whole. Where there are any, its step sizes are those above, those of blocks in
            subspaces times ``factor``.
    """

    label: str
    make: Callable[[Path, int, int, int], Task]
    width: int
    batch: int
    num_steps: int
    step_size: float
    step_size_v: float
    lr: float
    rank: float
    factor: float = 1.0
    damping: float = 0.1
    law: SketchLaw = "gaussian"
    whole: tuple[str, ...] = ()

    def bros(self, step_size_v: Callable[[int], float], seed: int) -> tuple[ohg.BROS, float]:
        """And what the step size of ``w`` is multiplied by."""
        settings: dict[str, Any] = {
            "rank": self.rank,
            "damping": self.damping,
            "law": self.law,
            "seed": seed,
        }
        if self.whole:
            return ohg.BROS(step_size_v, **settings, whole=self.whole, share=self.factor), 1.0
        by = self.factor / self.rank
        return ohg.BROS(lambda step: by * step_size_v(step), **settings), by


SETTINGS = {
    "mlp": Setting("cleaning, MLP", functools.partial(cleaning, network="mlp"), 2208, 64, 150, 20.0, 0.3, 0.3, 0.1),
    "representation": Setting("hyper-representation", representation, 2240, 64, 60, 10.0, 0.3, 0.02, 0.1),
    "mixture": Setting("data mixture, transformer", mixture, 688, 2, 150, 40.0, 0.3, 0.06, 0.25, 0.75, law="orthonormal", whole=("embed", "place", "read")),
    "convnet": Setting("cleaning, ConvNet", functools.partial(cleaning, network="convnet"), 672, 8, 100, 2.0, 0.3, 0.3, 0.18),
    "vit": Setting("reweighting, ViT", vit, 688, 24, 50, 4.0, 0.3, 0.3, 0.25),
}  # fmt: skip
METHODS = ("MA-SOBA", "BROS")
RESULTS = HERE.parent / "results"
Run = dict[str, Any]


def begin(task: Task, s: Setting, method: str, num_steps: int, seed: int) -> ohg.BilevelResult:
    def falling(step: int) -> float:
        return 1.0 - step / num_steps

    def of_v(step: int) -> float:
        return s.step_size_v * falling(step)

    estimator: ohg.MASOBA | ohg.BROS = ohg.MASOBA(of_v, damping=s.damping)
    by = 1.0
    if method == "BROS":
        estimator, by = s.bros(of_v, seed)

    def of_w(lam: object, step: int) -> float:
        return by * s.step_size * falling(step)

    return ohg.minimize_bilevel(
        task.problem,
        task.w,
        task.lam,
        inner_solver=ohg.GradientDescent(of_w, max_steps=1),
        estimator=estimator,
        num_steps=num_steps,
        optimizer=functools.partial(torch.optim.Adam, lr=s.lr),
        lr_lambda=falling,
    )


def alone(data: Path, name: str, method: str, scale: float, seed: int) -> Run:
    """One run, in this process, which must be fresh."""
    s = SETTINGS[name]
    torch.set_num_threads(1)
    begin(s.make(data, 64, 0, s.batch), s, method, 2, 0)  # what is loaded once does not count
    task = s.make(data, round(s.width * scale / 16) * 16, seed, s.batch)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    start = time.process_time()
    found = begin(task, s, method, s.num_steps, seed)
    seconds, peak = time.process_time() - start, resident("VmHWM") - before
    w, lam = found.inner_params, found.outer_params
    return {
        "weights": sum(x.numel() for x in task.w.values()),
        "MB": peak,
        "seconds": seconds / s.num_steps,
        "validation": task.validate(w, lam),
        "test": task.test(w, lam),
        "told": task.told(lam),
        "curve": [row["outer_value"] for row in found.history],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the five data sets")
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--scale", type=float, default=1.0, help="of widths, to try things out")
    parser.add_argument("--stored", type=Path, default=RESULTS / "subspaces.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--alone", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(alone(args.data, args.tasks[0], args.alone, args.scale, args.seeds[0])))
        return
    runs: dict[str, Run] = json.loads(args.stored.read_text()) if args.stored.exists() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name, seed, method in itertools.product(args.tasks, args.seeds, METHODS):
        key = f"{name} | {method} | {seed}"
        if key in runs:
            continue
        command = [sys.executable, __file__, "--data", str(args.data), "--tasks", name]
        command += ["--alone", method, "--scale", str(args.scale), "--seeds", str(seed)]
        said = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        runs[key] = json.loads(said.stdout.splitlines()[-1])
        args.stored.write_text(json.dumps(runs))
        shown = {k: v for k, v in runs[key].items() if k != "curve"}
        print(key, json.dumps(shown), flush=True)
    report(runs, args.stored)


def report(runs: dict[str, Run], stored: Path) -> None:
    heading = [
        "# BROS against MA-SOBA, at least 20 million weights below",
        "",
        "`python benchmarks/bilevel/subspaces.py --data DIR`: peak memory above the start, CPU time of a step, and what is learned, "
        f"one thread, float32, torch {torch.__version__}; means over seeds, range in brackets. Aim: 44.9 % less memory at a final validation loss at most 1 % higher. "
        "Test: error; for texts the loss in nats per character.",
        "",
    ]
    labels = {name: f"{s.label}, rank {s.rank:.0%}" for name, s in SETTINGS.items()}
    write(runs, labels, heading, stored)


if __name__ == "__main__":
    main()
