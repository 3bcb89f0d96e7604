"""What one hypergradient costs, in gradient evaluations and memory, beside what users would pick instead.

One hypergradient by implicit differentiation is the outer gradient, the inner gradient's graph, ``K``
Hessian-vector products and one mixed product. Three tasks, each with one decay per weight:

* softmax: regression on scikit-learn's digits (300 to train on, 700 to validate), 640 weights, inner
  problem solved to rounding, K = 20;
* mlp: 784-512-512-10, 669,706 weights, batch of 512, 200 steps of Adam, K = 10;
* convnet: two 3x3 convolutions and a linear layer, 20,490 weights, batch of 128 at 28x28, K = 10.

The networks are trained until the Hessian is positive definite along CG's path, so that CG takes all of
its K products; a row of ours fails if it did not.

Cost is CPU time (all threads of the process, children excluded: compilers do not count) divided by that
of one gradient evaluation of the same framework, the median of interleaved repetitions. Memory is the
peak above what was resident before the call. Every peer runs with glibc's ``malloc`` told to keep freed
memory (``ALLOCATOR``): by default it gives blocks of megabytes back and faults them in again, which costs the
ConvNet up to a third of its time, or nothing, as the order of its allocations happens to be. The error is against the same K-step formula in float64:
the column "float64" tells a wrong formula from rounding.

Peers live in environments of their own, made on the first run: ``benchmarks/.peers-venv`` (torch, pinned
and first) and ``benchmarks/.peers-venv-jax``. What does not install is listed as such. ``--sources`` takes
a checkout of a peer that is not on PyPI (hypertorch: github.com/prolearner/hypertorch) or is newer than its
release there (Betty: github.com/leopard-ai/betty).

    python benchmarks/product_cost.py                       # everything; best on an idle machine
    python benchmarks/product_cost.py --tasks softmax --peers ours torch
    python benchmarks/product_cost.py --sources hypertorch=DIR betty=DIR
    python benchmarks/product_cost.py --data DIR            # MNIST's gzip files in DIR, not enlarged digits
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
RESULTS = HERE / "results"
SOLVERS = ("cg", "neumann")
SOLVER_NAMES = {"cg": "CG", "neumann": "Neumann"}
TASKS = {
    "softmax": "(a) softmax regression on digits, 640 decays, K = 20",
    "mlp": "(b) MLP 784-512-512-10, 669,706 decays, batch 512, K = 10",
    "convnet": "(c) small ConvNet, 20,490 decays, batch 128, K = 10",
}
TARGETS = {
    ("softmax", "ours"): 19.0,
    ("softmax", "ours, compiled"): 8.0,
    ("mlp", "ours"): 16.5,
    ("mlp", "ours, compiled"): 13.5,
}
INNER_STEPS = (10, 1000)
ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TOP_PAD_": "67108864",
}
"""For timings only: memory is measured with glibc's defaults, which give freed memory back."""


@dataclass(frozen=True)
class Peer:
    """One row: a script, the environment that it runs in, and what pip needs for it.

    Args:
        where: "own" (this interpreter), "torch" or "jax".
        install: Arguments of ``pip install``; empty where the environment has it already.
        source: ``(name, repository)`` where it runs from a checkout that ``--sources name=DIR`` gives.
    """

    label: str
    script: str
    where: str = "own"
    arguments: tuple[str, ...] = ()
    install: tuple[str, ...] = ()
    source: tuple[str, str] | None = None
    solvers: tuple[str, ...] = SOLVERS
    note: str = ""

    @property
    def family(self) -> str:
        return self.label.split(",")[0].split(" ")[0]


def peers() -> list[Peer]:
    """Releases on PyPI are old where noted; ``--no-deps`` keeps them from replacing torch."""
    return [
        Peer("ours", "peer_ours.py"),
        Peer("ours, compiled", "peer_ours.py", arguments=("--compile",)),
        Peer("torch, graph kept", "peer_torch.py", arguments=("--way", "kept")),
        Peer("torch, jvp each time", "peer_torch.py", arguments=("--way", "jvp")),
        Peer(
            "hypertorch, repository",
            "peer_hypertorch.py",
            "torch",
            source=("hypertorch", "github.com/prolearner/hypertorch"),
            note="not on PyPI (the `hypertorch` there is another project).",
        ),
        Peer(
            "Betty, repository",
            "peer_betty.py",
            "torch",
            source=("betty", "github.com/leopard-ai/betty"),
            note="its CG is mended there since its issue 15.",
        ),
        Peer("TorchOpt 0.7.3", "peer_torchopt.py", "torch", install=("torchopt==0.7.3",)),
        Peer(
            "Betty 0.1.1",
            "peer_betty.py",
            "torch",
            install=("--no-deps", "betty-ml==0.1.1"),
            note="its CG uses the old residual in the new direction: wrong.",
        ),
        Peer(
            "moskomule's hypergrad 0.0.1",
            "peer_moskomule.py",
            "torch",
            install=("--no-deps", "hypergrad==0.0.1"),
            note="CG as Betty's, wrong.",
        ),
        Peer(
            "higher 0.2.1",
            "peer_higher.py",
            "torch",
            install=("--no-deps", "higher==0.2.1"),
            solvers=("neumann",),
            note="unrolls K + 1 steps, which is the Neumann series with K products where the inner gradient "
            "is zero; unmaintained since 2021.",
        ),
        Peer(
            "jaxopt 0.8.5, jit",
            "peer_jaxopt.py",
            "jax",
            install=("jaxopt==0.8.5", "scipy"),
            note="its unit is JAX's jitted gradient.",
        ),
    ]


class Environments:
    """Interpreters and import paths, and why a peer is not in one."""

    def __init__(self, log: Path, sources: dict[str, Path]) -> None:
        self.log, self.sources = log, sources

    def python(self, where: str) -> str:
        if where == "own":
            return sys.executable
        return str(self._folder(where) / "bin" / "python")

    def prepare(self, peer: Peer) -> str | None:
        """Install a peer where it is missing; ``None``, or why that failed."""
        if peer.where == "own":
            return None
        if peer.source and peer.source[0] not in self.sources:
            name, repository = peer.source
            return f"needs a checkout of {repository}: `--sources {name}=DIR`"
        stamps = self._folder(peer.where) / "installed.json"
        if not stamps.exists():
            print(f"making {stamps.parent} ...", flush=True)
            venv.create(stamps.parent, with_pip=True, clear=True)
            base = ["torch==2.13.0"] if peer.where == "torch" else ["jax"]
            failure = self._pip(peer.where, *base) or self._pip(peer.where, "numpy")
            if failure:
                return failure
            stamps.write_text("{}")
        known: dict[str, str | None] = json.loads(stamps.read_text())
        if peer.install and peer.label not in known:
            known[peer.label] = self._pip(peer.where, *peer.install)
            stamps.write_text(json.dumps(known, indent=1))
        return known.get(peer.label)

    def variables(self, peer: Peer, threads: int, allocator: dict[str, str]) -> dict[str, str]:
        """Of the environment that a peer's process runs in."""
        checkout = {"PYTHONPATH": str(self.sources[peer.source[0]])} if peer.source else {}
        return _variables(threads) | allocator | checkout

    def _folder(self, where: str) -> Path:
        return HERE / (".peers-venv" if where == "torch" else ".peers-venv-jax")

    def _pip(self, where: str, *arguments: str) -> str | None:
        constraints = ["--constraint", str(self.log / "constraints.txt")]
        (self.log / "constraints.txt").write_text("torch==2.13.0\n")
        command = [self.python(where), "-m", "pip", "install", "--quiet", *constraints, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return errors[-1] if errors else "pip failed"


def measure(
    environments: Environments, peer: Peer, task: Path, solver: str, threads: int, *arguments: str
) -> dict[str, Any]:
    """One process of a peer's script; ``{"failure": why}`` if it did not give figures."""
    command = [environments.python(peer.where), str(PEERS / peer.script), str(task), solver]
    allocator = {} if "--memory" in arguments else ALLOCATOR
    done = subprocess.run(
        [*command, "--threads", str(threads), *peer.arguments, *arguments],
        capture_output=True,
        text=True,
        env=environments.variables(peer, threads, allocator),
        check=False,
    )
    if done.returncode:
        return {"failure": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _variables(threads: int) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(options: argparse.Namespace, stored: Path) -> dict[str, Any]:
    """All figures; they are in ``stored`` (.json) as far as the run came."""
    found: dict[str, Any] = {"rows": {}, "missing": {}, "inner_steps": {}}
    found["revisions"] = {name: _revision(folder) for name, folder in options.sources.items()}
    with tempfile.TemporaryDirectory() as scratch:
        environments = Environments(Path(scratch), options.sources)
        wanted = [p for p in peers() if not options.peers or p.family in options.peers]
        usable = []
        for peer in wanted:
            reason = environments.prepare(peer)
            if reason is None:
                usable.append(peer)
            else:
                found["missing"][peer.label] = reason
        for name in options.tasks:
            task = Path(scratch) / f"{name}.npz"
            data = ["--data", str(options.data)] if options.data else []
            print(f"preparing {name} ...", flush=True)
            command = [sys.executable, str(PEERS / "prepare.py"), name, str(task), *data]
            subprocess.run(command, check=True, env=_variables(options.threads))
            for peer in usable:
                for solver in peer.solvers:
                    place = environments, peer, task, solver, options.threads
                    row = measure(*place, "--repetitions", str(options.repetitions))
                    if "failure" not in row:
                        row["megabytes"] = measure(*place, "--memory").get("megabytes")
                        row["error64"] = measure(*place, "--float64").get("error")
                    found["rows"][f"{name}/{peer.label}/{solver}"] = row
                    print(f"{name} / {peer.label} / {solver}: {_brief(row)}", flush=True)
                    stored.write_text(json.dumps(found, indent=1))
            if name == "mlp" and any(p.label == "ours" for p in usable):
                for steps in INNER_STEPS:
                    place = environments, usable[0], task, "cg", options.threads
                    row = measure(*place, "--memory", "--inner-steps", str(steps))
                    found["inner_steps"][str(steps)] = row.get("megabytes")
                    print(f"{steps} inner steps: {row.get('megabytes')} MB", flush=True)
        stored.write_text(json.dumps(found, indent=1))
    return found


def _brief(row: dict[str, Any]) -> str:
    if "failure" in row:
        return str(row["failure"])
    return f"{row['evaluations']:.1f} evaluations, {row['megabytes']} MB, error {row['error64']} in float64"


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    listed = {p.label: p for p in peers()}
    lines = [
        "# The cost of one hypergradient",
        "",
        "`python benchmarks/product_cost.py`: CPU time of one whole hypergradient divided by that of one "
        "gradient evaluation (forward and backward of the inner objective) of the same framework, and peak "
        f"memory above the start. {options.threads} thread(s), freed memory kept by malloc, median of {options.repetitions} interleaved "
        f"repetitions, quartiles in brackets; {_processor()}, Python {platform.python_version()}, torch "
        f"{_version('torch')}. Error: against the same K-step formula in float64, computed in float32 and "
        "in float64. The first call compiles, or finds compiled code in torch's cache.",
        "",
    ]
    for name in options.tasks:
        lines += [
            f"## {TASKS[name]}",
            "",
            "| | CG | Neumann | unit, ms | MB, CG | MB, Neumann | error, CG (float64) | error, Neumann (float64) | first call, s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for label in listed:
            rows = [found["rows"].get(f"{name}/{label}/{solver}") for solver in SOLVERS]
            if any(rows):
                lines.append(_table_row(label, rows))
            elif label in found["missing"]:
                lines.append(f"| {label} | not run: {found['missing'][label]} |{' |' * 7}")
        lines.append("")
    notes = [f"* {p.label}: {p.note}" for p in listed.values() if p.note]
    notes += [f"* --sources {k}: {v}." for k, v in found["revisions"].items()]
    failures = {k: r["failure"] for k, r in found["rows"].items() if "failure" in r}
    notes += [f"* {k} fails: `{why}`" for k, why in failures.items()]
    lines += ["## Notes", "", *notes, ""]
    if found["inner_steps"]:
        sizes = ", ".join(f"{v:.0f} MB at {k} steps" for k, v in found["inner_steps"].items() if v)
        lines += [
            "## Memory and inner steps",
            "",
            f"Inner solve and hypergradient together, ours, (b): {sizes}.",
            "",
        ]
    return "\n".join([*lines, *_verdicts(found, options)])


def _verdicts(found: dict[str, Any], options: argparse.Namespace) -> list[str]:
    lines = ["## Targets", "", "| | target | CG | Neumann |", "|---|---|---|---|"]
    for (name, label), target in TARGETS.items():
        if name not in options.tasks:
            continue
        cells = []
        for solver in SOLVERS:
            row = found["rows"].get(f"{name}/{label}/{solver}", {})
            value = row.get("evaluations")
            cells.append(
                "-"
                if value is None
                else f"{value:.1f} {'met' if value <= target else '**missed**'}"
            )
        lines.append(f"| {TASKS[name][:3]} {label} | {target} | {' | '.join(cells)} |")
    return [*lines, ""]


def _table_row(label: str, rows: list[dict[str, Any] | None]) -> str:
    def cell(row: dict[str, Any] | None, key: str, form: str) -> str:
        if row is None:
            return "-"
        if "failure" in row:
            return "fails"
        return "-" if row.get(key) is None else form.format(row[key])

    def evaluations(row: dict[str, Any] | None) -> str:
        if row is None or "failure" in row:
            return cell(row, "", "")
        low, high = row["evaluations_quartiles"]
        return f"**{row['evaluations']:.1f}** ({low:.1f}-{high:.1f})"

    def errors(row: dict[str, Any] | None) -> str:
        if row is None or "failure" in row:
            return cell(row, "", "")
        wrong = " **wrong**" if _is_wrong(row) else ""
        return f"{row['error']:.0e} ({cell(row, 'error64', '{:.0e}')}){wrong}"

    units = [r["gradient_ms"] for r in rows if r and "failure" not in r]
    firsts = [r["first_call_seconds"] for r in rows if r and "failure" not in r]
    cells = [
        label,
        *map(evaluations, rows),
        f"{min(units):.2f}" if units else "-",
        *(cell(r, "megabytes", "{:.1f}") for r in rows),
        *map(errors, rows),
        f"{max(firsts):.1f}" if firsts else "-",
    ]
    return f"| {' | '.join(cells)} |"


def draw(found: dict[str, Any], options: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = [p.label for p in peers() if any(f"/{p.label}/" in k for k in found["rows"])]
    figure, axes = pyplot.subplots(
        1,
        len(options.tasks),
        figsize=(2.2 + 3.4 * len(options.tasks), 0.9 + 0.42 * len(labels)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], options.tasks, strict=True):
        for offset, solver in ((-0.2, "cg"), (0.2, "neumann")):
            rows = [found["rows"].get(f"{name}/{label}/{solver}", {}) for label in labels]
            _draw_bars(axis, rows, offset, SOLVER_NAMES[solver])
        axis.set_xscale("log")
        axis.set_xlim(3, 1200)
        axis.set_title(TASKS[name].replace(", ", "\n", 1), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    axes[0][0].legend(loc="lower right", fontsize=8, frameon=False)
    figure.supxlabel("gradient evaluations in one hypergradient (CPU time)", fontsize=9)
    figure.savefig(path, dpi=130)


def _draw_bars(axis: Any, rows: list[dict[str, Any]], offset: float, label: str) -> None:
    """One bar a row, its figure behind it; hatched where the formula is wrong."""
    heights = [i + offset for i in range(len(rows))]
    bars = axis.barh(heights, [r.get("evaluations", 0.0) for r in rows], height=0.38, label=label)
    for bar, row, height in zip(bars, rows, heights, strict=True):
        text = "fails" if "failure" in row else ""
        if "evaluations" in row:
            text = f"{row['evaluations']:.1f}"
        if _is_wrong(row):
            bar.set(hatch="////", alpha=0.5)
            text += " (wrong)"
        place = max(row.get("evaluations", 0.0), 3.0), height
        axis.annotate(text, place, (3, 0), textcoords="offset points", va="center", fontsize=7)


def _is_wrong(row: dict[str, Any]) -> bool:
    """Further off in float64 than an inner gradient that is not quite zero explains."""
    return (row.get("error64") or 0.0) > 0.1


def _revision(folder: Path) -> str:
    """What a checkout holds: git's commit, or what its file ``REVISION`` says."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    if (folder / ".git").exists():
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    told = folder / "REVISION"
    return told.read_text().strip() if told.exists() else "revision unknown"


def _source(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with an existing folder")
    return name, Path(folder).resolve()


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = next(
            x.split(":")[1].strip() for x in text.splitlines() if x.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} CPUs ({name})"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--peers", nargs="+", help="first words of the labels; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--data", type=Path, help="folder with MNIST's train-*.gz")
    parser.add_argument("--sources", nargs="+", type=_source, default=[], metavar="NAME=DIR")
    parser.add_argument("--redraw", action="store_true", help="from the last run's .json")
    parser.add_argument("--output", type=Path, default=RESULTS / "product_cost.md")
    options = parser.parse_args()
    options.sources = dict(options.sources)
    options.output.parent.mkdir(exist_ok=True)
    stored = options.output.with_suffix(".json")
    found = json.loads(stored.read_text()) if options.redraw else run(options, stored)
    text = report(found, options)
    options.output.write_text(text)
    draw(found, options, options.output.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
