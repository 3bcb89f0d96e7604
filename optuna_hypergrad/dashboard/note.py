"""The study's note: what was tuned, how far it has come, what to beware of, and how to load it.

In the format of ``optuna_dashboard/_note.py``: Markdown, in pieces of 2,045 characters among the study's system
attributes. Ours is the part between two marks, which do not show; the rest of the note belongs to others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .._terminal import plain
from ..studies.inspection import TrajectorySummary
from ..trial_attributes import value_kind_of
from .findings import Findings, count_of, outer_steps

PREFIX = "dashboard:note_"
_VERSION, _PIECE = "dashboard:note_ver", "dashboard:note_str:"
_PIECE_LENGTH = 2045
BEGIN = '[//]: # "optuna-hypergrad: begin; what follows is written anew as the study goes on"'
END = '[//]: # "optuna-hypergrad: end"'
_OURS = re.compile(  # a mark is a line; a name that says the same stands within one
    rf"(?:\r?\n\r?\n)?^{re.escape(BEGIN)}\r?\n(?:(?!^{re.escape(BEGIN)}\r?$).)*?^{re.escape(END)}(?=\r?$)",
    re.S | re.M,
)
_MOST_ROWS = 12
_LONGEST = 60


def changed(known: Mapping[str, Any], findings: Findings) -> dict[str, Any]:
    """The attributes of a note in which our part says what is found.

    The version stays as it is, so that somebody who is editing the note in the dashboard can save it.
    """
    body = merged(body_of(known), section(findings))
    pieces = [body[i : i + _PIECE_LENGTH] for i in range(0, len(body), _PIECE_LENGTH)]
    found: dict[str, Any] = {f"{_PIECE}{i}": piece for i, piece in enumerate(pieces)}
    found |= {k: "" for k in known if k.startswith(_PIECE) and k not in found}
    return found if _VERSION in known else {**found, _VERSION: 1}


def body_of(known: Mapping[str, Any]) -> str:
    """The whole note."""
    if _VERSION not in known:
        return ""
    pieces, number = [], 0
    while isinstance(piece := known.get(f"{_PIECE}{number}"), str):
        pieces.append(piece)
        number += 1
    return "".join(pieces)


def merged(body: str, ours: str) -> str:
    """The note with our part in its place, or else below what is there."""
    part = f"{BEGIN}\n\n{ours}\n\n{END}"
    found = list(_OURS.finditer(body))
    if not found:
        return f"{body.rstrip()}\n\n{part}" if body.strip() else part
    last = found[-1]
    gap = "\n\n" if last.start() > 0 else ""
    return f"{body[: last.start()]}{gap}{part}{body[last.end() :]}"


def section(findings: Findings) -> str:
    """Our part of the note, without the marks."""
    blocks = [
        "## Hypergradients",
        "\n".join(f"- {line}" for line in _facts(findings)),
        *_tensors(findings),
        *_trajectories(findings),
        *_warnings(findings.warnings),
        *_how_to_load(findings),
    ]
    return "\n\n".join(blocks)


def _facts(findings: Findings) -> Iterator[str]:
    total = sum(findings.trials.values())
    states = ", ".join(f"{n} {state}" for state, n in findings.trials.items() if n)
    yield f"**Trials**: {total} ({states or 'none yet'})"
    best = findings.best
    if best is not None:
        yield f"**Best value**: {_number(best.values[0])}, in trial {best.number}{_kind(findings)}"
    count = count_of(findings)
    if count is not None:
        steps = None if best is None else outer_steps(best)
        within = "" if steps is None else f" in {steps:,} outer steps"
        yield f"**Tuned by hypergradients**: {count:,} numbers{within}"
    if findings.estimators:
        yield f"**Estimator**: {', '.join(code(e, longest=120) for e in findings.estimators)}"
    trajectory = findings.best_trajectory
    if trajectory is not None:
        yield (
            f"**Best trajectory**: {trajectory.id}, {_times(trajectory.steps, 'step')} from "
            f"{_start(trajectory)}{_setting(trajectory)}"
        )
    if findings.gap is not None and findings.median_gap is not None:
        warm, retrained = findings.gap
        yield (
            f"**Warm against retrained**: {_number(warm)} at the end of the best trial's warm-started run, "
            f"{_number(retrained)} trained again from scratch; median difference over all trials "
            f"{findings.median_gap:+.3g}"
        )


def _tensors(findings: Findings) -> Iterator[str]:
    if not findings.summaries:
        return
    rows = []
    for name, summary in list(findings.summaries.items())[:_MOST_ROWS]:
        bounds = [
            f"{100 * share:.3g} % at its {side}"
            for side, share in (("low", summary.get("at_low")), ("high", summary.get("at_high")))
            if isinstance(share, (int, float)) and share > 0
        ]
        quantiles = [_number(summary.get(k)) for k in ("min", "q50", "max")]
        shape = " x ".join(str(n) for n in summary["shape"])
        rows.append([code(name, table=True), shape, *quantiles, ", ".join(bounds) or "none"])
    of = "" if findings.best is None else f" in trial {findings.best.number}"
    yield f"**The largest tensors{of}**"
    yield _table(["tensor", "shape", "least", "median", "largest", "at a bound"], "lrrrrl", rows)


def _trajectories(findings: Findings) -> Iterator[str]:
    found = findings.trajectories
    if not found:
        return
    sign = -1.0 if findings.maximizes else 1.0

    def rank(trajectory: TrajectorySummary) -> tuple[bool, float]:
        value = trajectory.best_value
        return value is None, 0.0 if value is None else sign * value

    rows = [
        [
            str(t.id),
            str(t.steps),
            _number(t.best_value),
            "" if t.best_trial is None else str(t.best_trial),
            ", ".join(code(f"{n}={v}", table=True) for n, v in t.setting.items()) or "none",
            _state(t),
        ]
        for t in sorted(found, key=rank)[:_MOST_ROWS]
    ]
    more = f", the best {_MOST_ROWS} of {len(found)}" if len(found) > _MOST_ROWS else ""
    yield f"**Trajectories**{more}"
    titles = ["trajectory", "steps", "best value", "in trial", "discrete setting", "state"]
    yield _table(titles, "rrrrll", rows)


def _warnings(warnings: Sequence[str]) -> Iterator[str]:
    if warnings:
        yield "**Beware**"
        yield "\n".join(f"- {_escaped(w)}" for w in warnings)


def _how_to_load(findings: Findings) -> Iterator[str]:
    if not findings.stored:
        return
    shown = list(findings.stored)[:3]
    names = ", ".join(repr(_cut(n)) for n in shown) + (", ..." if len(findings.stored) > 3 else "")
    lines = [
        "import optuna",
        "import optuna_hypergrad as ohg",
        "",
        f"study = optuna.load_study(study_name={findings.name!r}, storage=...)",
        f"tensors = ohg.load_tensors(study)  # of the best trial: {names}",
    ]
    yield "**Load them**"
    yield "\n".join(["```python", *map(plain, lines), "```"])


def _kind(findings: Findings) -> str:
    kind = None if findings.best is None else value_kind_of(findings.best)
    return "" if kind is None else f" ({kind})"


def _start(trajectory: TrajectorySummary) -> str:
    if trajectory.source.startswith("trial "):
        return f"the point of {trajectory.source}"
    named = {"init": "the initial point", "base": "a point of the base sampler"}
    return named.get(trajectory.source, "an enqueued point")


def _setting(trajectory: TrajectorySummary) -> str:
    if not trajectory.setting:
        return ""
    return ", at " + ", ".join(code(f"{n}={v}") for n, v in trajectory.setting.items())


def _state(trajectory: TrajectorySummary) -> str:
    if trajectory.stop is None:
        return "open"
    return "over: " + _escaped(_cut(trajectory.stop, 120)).replace("|", "\\|")


def _times(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _table(titles: Sequence[str], sides: str, rows: Sequence[Sequence[str]]) -> str:
    """Args: sides: ``l`` or ``r`` for each column."""
    lines = [titles, [":---" if side == "l" else "---:" for side in sides], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: Any) -> str:
    return f"{value + 0.0:.6g}" if isinstance(value, (int, float)) else ""


def code(text: str, *, table: bool = False, longest: int = _LONGEST) -> str:
    """Any text as inline code, which is nothing else than text."""
    shown = _cut(plain(text), longest)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    padding = " " if shown.startswith("`") or shown.endswith("`") else ""
    if table:
        shown = shown.replace("|", "\\|")
    return f"{fence}{padding}{shown}{padding}{fence}"


def _escaped(text: str) -> str:
    """Text in which nothing is Markdown."""
    return re.sub(r"([\\`*_\[\]<>#!~])", r"\\\1", plain(text))


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
