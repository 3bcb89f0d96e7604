"""The code of the README runs as it stands, with fewer trials, and does what its text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import optuna
import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = (
        "\n".join(blocks)
        .replace("n_trials=30", "n_trials=4")
        .replace("progress=True", "progress=False")
    )
    assert "n_trials=4" in code
    names: dict[str, Any] = {}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        exec(compile(code, "<code of the README>", "exec"), names)
    finally:
        optuna.logging.set_verbosity(verbosity)
    assert names["study"].best_value < 0.4
    assert (tmp_path / "study.db").exists()
    assert len(names["runs"].trials) == 3
    weights = names["weights"]
    assert float(weights[:100].mean()) < 0.6 * float(weights[100:].mean())
    assert capsys.readouterr().out
