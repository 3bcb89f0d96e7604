"""Garbage in the database leads to success or to a typed error: never to code, a hang or a memory blow-up.

The large version: ``benchmarks/reliability/hostile_rows.py``.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from garbage import KNOWN, MARK, PICKLE
from hostile import examine


@pytest.mark.timeout(1200)  # half a minute, on a machine that does nothing else
def test_garbage_in_any_row() -> None:
    cases = list(examine(-len(KNOWN), 60))
    assert [case for case in cases if case["failures"]] == []
    assert len(cases) == 60 + len(KNOWN)
    outcomes = [outcome for case in cases for outcome in case["outcomes"].values()]
    assert 0 < outcomes.count("success") < len(outcomes)


def test_the_code_in_the_garbage_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "0")
    pickle.loads(PICKLE)
    assert os.environ[MARK] == "1"


CRIMES = {
    "pickle.find_class": "pickle.loads(PICKLE)",
    "exec": "exec('1 + 1')",
    "compile": "eval('1 + 1')",
    "os.system": "os.system('true')",
    "subprocess.Popen": "subprocess.run(['true'])",
    "socket.connect": "socket.socket().connect_ex(('127.0.0.1', 9))",
    "open": "open(directory.parent / 'outside', 'w').close()",
    "os.remove": "os.path.exists('x') or os.remove(directory.parent / 'outside')",
    "of memory were taken": "len(b'x' * 400_000_000)",
    "not done after": "time.sleep(9)",
}


def test_the_watch_sees_what_it_must_see(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").touch()
    lines = [
        "import os, pickle, socket, subprocess, time",
        "from pathlib import Path",
        "from garbage import PICKLE",
        "from watching import Hang, Watch",
        f"directory = Path({str(inside)!r})",
        "watch = Watch(directory, 2.0, 300)",
    ]
    for kind, crime in CRIMES.items():
        lines += [
            "try:",
            "    with watch:",
            "        open(directory / 'allowed', 'w').close()",
            f"        {crime}",
            "except Hang as hang:",
            "    watch.violations.append(str(hang))",
            f"assert any({kind!r} in v for v in watch.violations), ({kind!r}, watch.violations)",
        ]
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, str(script)], check=True, env=environment, timeout=60)
