"""Garbage for the rows of a database: typed, large, deep, nearly right, and with code in it."""

from __future__ import annotations

import base64
import builtins
import json
import math
import pickle
import random
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "HYPERGRAD_HOSTILE_CODE_HAS_RUN"
"""An environment variable: set by the code in the garbage, should anybody run it."""

_CODE = f"__import__('os').environ.__setitem__('{MARK}', '1')"


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.exec, (_CODE,)


PICKLE = pickle.dumps(_Payload())
_TEXTS: tuple[Callable[[], str], ...] = (
    lambda: "",
    lambda: "\0\x1b[2J\u202e\N{PILE OF POO}",
    lambda: PICKLE.hex(),
    lambda: base64.b64encode(PICKLE).decode(),
    lambda: PICKLE.decode("latin-1"),
    lambda: _CODE,
    lambda: f"!!python/object/apply:builtins.exec ['{_CODE}']",
    lambda: '{"__reduce__": ["builtins.exec", ["1/0"]]}',
    lambda: "'; DROP TABLE trials; --",
    lambda: "../../../etc/passwd",
    lambda: "{0.__class__.__init__.__globals__} %s %(x)s",
    lambda: "9" * 4400,
    lambda: "x" * 10_000_000,
)
_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2**31, 2**53 + 1, 2**60, 2**63 - 1, -(2**63)),
    *(math.nan, math.inf, -math.inf, 1e308, -5e-324, 0.5),
)
_TOO_LARGE = (2**63, 2**64, -(2**70), 10**300, 10**400)
_EVENTS = ("claim", "gradient", "outcome", "owner", "cut_off", "heir_of", "resumed_at")
_OTHERS = (
    "fixed_params",
    "retry_history",
    "failed_trial",
    "grid_id",
    "constraints:c",
    "constraints",
)
_ROLES = ("value", "step_state", "gradient", "checkpoint")


def text(rng: random.Random) -> str:
    return rng.choice(_TEXTS)()


def cell(rng: random.Random) -> Any:
    """For any column: SQLite keeps what it is given."""
    return rng.choice([rng.choice(_NUMBERS), text(rng), PICKLE, None, b"", b"\xff\xfe"])


def value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that is JSON, in Python's sense of it."""
    kind = rng.randrange(9 if depth < 3 else 5)
    if kind < 3:
        return rng.choice([None, True, False, *_NUMBERS, *_TOO_LARGE])
    if kind < 5:
        return text(rng)
    if kind == 5:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {text(rng)[:50]: value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if kind == 7:
        return {"pieces": rng.choice([2**60, -1, 3, 1, "2", None])}
    return _nested(rng.choice([50, 300, 900]), rng.choice(["list", "dict"]))


def document(rng: random.Random, before: str) -> Any:
    """What a column of JSON texts gets in the place of ``before``: mostly that, changed a little."""
    try:
        found = json.loads(before)
    except (TypeError, ValueError, RecursionError):
        found = None
    if isinstance(found, (dict, list)) and found and rng.random() < 0.7:
        _change(rng, found)
        return json.dumps(found)
    return rng.choice(
        [
            lambda: json.dumps(value(rng)),
            lambda: json.dumps(value(rng)),
            lambda: cell(rng),
            lambda: before[: len(before) // 2],
            lambda: "[" * 100_000,
            lambda: '{"a":' * 5000 + "1" + "}" * 5000,
            lambda: '{"kind": "good", "kind": "void", "kind": [NaN, Infinity]}',
        ]
    )()


def _change(rng: random.Random, node: Any) -> None:
    """Replace, remove, add or double one thing anywhere in ``node``."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        how = rng.randrange(6)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, list):
            node.append(node[key])
        elif how == 1:
            node[text(rng)[:50]] = node[key]
        elif how == 2 and isinstance(node[key], (int, float)):
            node[key] = rng.choice([node[key] + 1, -node[key], str(node[key]), [node[key]]])
        else:
            node[key] = value(rng)
        return


def _nested(depth: int, kind: str) -> Any:
    inner: Any = 1
    for _ in range(depth):
        inner = [inner] if kind == "list" else {"a": inner}
    return inner


_DOCUMENTS = (
    *[("trial_system_attributes", "value_json")] * 12,
    *[("study_user_attributes", "value_json")] * 2,
    *[("trial_params", "distribution_json")] * 2,
    ("trial_user_attributes", "value_json"),
    ("study_system_attributes", "value_json"),
)
_CELLS = (
    *[("hypergrad_blobs", c) for c in ("artifact_id", "num_bytes", "written")] * 2,
    *[("hypergrad_chunks", c) for c in ("artifact_id", "chunk", "data")] * 2,
    ("hypergrad_version", "schema_version"),
    ("hypergrad_version", "id"),
    ("trial_system_attributes", "key"),
    ("study_user_attributes", "key"),
    *[("trial_params", c) for c in ("param_name", "param_value", "trial_id")] * 2,
    *[("trial_values", c) for c in ("value", "value_type", "objective")] * 2,
    *[("trial_intermediate_values", c) for c in ("step", "intermediate_value")],
    *[("trials", c) for c in ("state", "number", "datetime_start", "datetime_complete")],
    ("studies", "study_name"),
    ("study_directions", "direction"),
)


KNOWN = (
    "UPDATE hypergrad_blobs SET num_bytes = 9e999",
    "UPDATE hypergrad_version SET schema_version = x'00'",
    "UPDATE hypergrad_chunks SET data = 10000000000",
    "UPDATE trial_system_attributes SET key = x'ff' WHERE key = 'hypergrad:claim'",
    "UPDATE trial_params SET param_name = x'ff' WHERE param_id IN (1, 9, 13)",
    "UPDATE trial_params SET param_name = NULL WHERE trial_id = 2",
    "UPDATE studies SET study_name = x'ff' WHERE study_id = 2",
    "UPDATE trials SET number = 9007199254740993 WHERE trial_id = 3",
    "UPDATE trial_values SET value = x'fffe' WHERE trial_id = 3",
    "UPDATE trial_params SET distribution_json = json_set(distribution_json, '$.attributes.log', 'x')"
    " WHERE trial_id > 1 AND param_name = 'n'",
    "UPDATE trials SET number = x'ff' WHERE study_id = 2",
    "DELETE FROM trial_values WHERE trial_id = 2",
    "INSERT INTO trial_system_attributes VALUES (NULL, 4, 'constraints', '{\"c\": null}')",
    "UPDATE trial_system_attributes SET value_json = '5' WHERE key = 'fixed_params'",
    "UPDATE trial_system_attributes SET value_json = json_set(value_json, '$.until', json('1'"
    " || printf('%.400d', 0))) WHERE key = 'hypergrad:owner'",
)
"""Garbage that has once led to something else than a typed error."""


def spoil(path: Path, seed: int) -> list[str]:
    """Write garbage into one to three rows of a database; in words, which.

    Args:
        seed: Of the garbage; of ``KNOWN``, counted from the end, if it is negative.
    """
    rng = random.Random(seed)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("PRAGMA ignore_check_constraints=ON")
    if seed < 0:
        connection.execute(KNOWN[seed])
        connection.close()
        return [KNOWN[seed]]
    done: list[str] = []
    while not done or (len(done) < 3 and rng.random() < 0.3):
        try:
            done.append(
                rng.choice([_change_document] * 5 + [_change_cell] * 4 + [_add] * 2)(
                    connection, rng
                )
            )
        except (sqlite3.Error, OverflowError, UnicodeEncodeError):
            continue  # the database refuses it
    connection.close()
    return done


def _change_document(connection: sqlite3.Connection, rng: random.Random) -> str:
    table, column = rng.choice(_DOCUMENTS)
    row, before = _row(connection, rng, table, column)
    return _set(connection, table, column, row, document(rng, before))


def _change_cell(connection: sqlite3.Connection, rng: random.Random) -> str:
    table, column = rng.choice(_CELLS)
    row, before = _row(connection, rng, table, column)
    new = cell(rng)
    if isinstance(before, (int, float)) and rng.random() < 0.3:
        new = before + rng.choice([-1, 1, 2**40])
    elif isinstance(before, bytes) and rng.random() < 0.5:
        new = rng.choice([b"\0" * ((1 << 24) + 1), b"\0" * 20_000_000, before[:-1], before * 2])
    return _set(connection, table, column, row, new)


def _add(connection: sqlite3.Connection, rng: random.Random) -> str:
    """A row that nobody has written."""
    choice = rng.randrange(4)
    if choice == 0:
        blob = f"hg-{uuid.UUID(int=rng.getrandbits(128)).hex}-{uuid.UUID(int=rng.getrandbits(128)).hex}"
        table, row = "hypergrad_blobs", [rng.choice([blob, text(rng)[:500]]), cell(rng), cell(rng)]
    elif choice == 1:
        blob, _ = _row(connection, rng, "hypergrad_blobs", "artifact_id")
        (known,) = connection.execute(
            "SELECT artifact_id FROM hypergrad_blobs WHERE rowid = ?", (blob,)
        ).fetchone()
        table, row = "hypergrad_chunks", [known, rng.choice([-1, 99, 2**40]), cell(rng)]
    elif choice == 2:
        key = f"hypergrad:study:{uuid.UUID(int=rng.getrandbits(128)).hex}"
        study = rng.choice([1, 2, 99])
        table, row = "study_user_attributes", [None, study, key, json.dumps(value(rng))]
    else:
        key = rng.choice(
            [
                f"hypergrad:{rng.choice(_EVENTS)}",
                rng.choice(_OTHERS),
                f"hypergrad:tensor:{rng.choice(_ROLES)}:{rng.choice(['x', '0' * 32])}",
            ]
        )
        trial, _ = _row(connection, rng, "trials", "trial_id")
        table, row = "trial_system_attributes", [None, trial, key, json.dumps(value(rng))]
    marks = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table} VALUES ({marks})", row)
    return f"{table} += {_short(row)}"


def _row(
    connection: sqlite3.Connection, rng: random.Random, table: str, column: str
) -> tuple[int, Any]:
    rows = connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
    if not rows:
        raise sqlite3.Error(f"{table} is empty")
    found: tuple[int, Any] = rng.choice(rows)
    return found


def _set(connection: sqlite3.Connection, table: str, column: str, row: int, new: Any) -> str:
    connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))
    return f"{table}.{column}[{row}] = {_short(new)}"


def _short(new: Any) -> str:
    shown = repr(new)
    return shown if len(shown) < 400 else f"{shown[:300]}... ({len(shown)} characters)"
