"""Names as input: whatever text it is, it comes back as it was, or is refused before anything is stored."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from typing import Any

import optuna
import sqlalchemy as sa
import torch
from hypothesis import strategies as st
from optuna.storages import RDBStorage
from specimen import sampler, warnings
from torch import Tensor

import optuna_hypergrad as ohg
from optuna_hypergrad import HypergradError, cli, load_tensors

_PIECES = (
    *(
        "'",
        '"',
        "`",
        "\\",
        "''",
        '";',
        "$$",
        "%s",
        "%(x)s",
        "{0}",
        ":x",
        "?",
        "/",
        "//",
        "../",
        ".",
    ),
    *("\0", "\n", "\r\n", "\t", "\x1b[31m", "\x7f", "\x9b2J", "\u2028", "\ufeff", " ", "  "),
    *("\N{PILE OF POO}", "\N{ZERO WIDTH JOINER}", "\u202e", "\u0301", "e\u0301", "\xe9", "\u6f22"),
    *("'; DROP TABLE trials; --", "1 OR 1=1", "NULL", "None", "nan", "#", "#float:0", "hypergrad:"),
    *("__metadata__", "__class__", "constructor", "fixed_params", "x", "X", "a", "w", "/w"),
    *("\ud800", "\udfff", "\ud83d\ude00"),
)
NAMES: st.SearchStrategy[str] = st.one_of(
    st.lists(st.sampled_from(_PIECES), max_size=4).map("".join),
    st.text(st.characters(exclude_categories=()), max_size=12),
    st.sampled_from(_PIECES).flatmap(
        lambda piece: st.sampled_from((64, 255, 512, 513, 2600, 10_000)).map(
            lambda length: (piece * length)[:length]
        )
    ),
)


_TABLES = ("studies", "trial_params", "hypergrad_blobs")


@dataclass(frozen=True)
class Names:
    """Of everything that has one."""

    study: str
    number: str
    tensor: str
    tree: str
    entries: tuple[str, ...]
    num_odd: int
    """How many of them are not plain."""

    def objective(self, trial: Any) -> Tensor:
        x = trial.suggest_float(self.number, 1e-2, 1e2, log=True)
        t = trial.suggest_tensor(self.tensor, 2, 0.0, 1.0)
        like = {name: torch.zeros(1) for name in self.entries}
        tree = trial.suggest_tensor_like(self.tree, like, -1.0, 1.0)
        loss = (x.log() - 1.0) ** 2 + (t - 0.3).pow(2).sum()
        return loss + sum((v.sum() - 0.1 * i) ** 2 for i, v in enumerate(tree.values()))


def all_names() -> st.SearchStrategy[Names]:
    """Plain ones but for three or four: most sets have one that is refused, or none."""
    slots = ("study", "number", "tensor", "tree", "entry", "entry 2", "entry 3")
    odd = st.dictionaries(st.sampled_from(slots), NAMES, min_size=3, max_size=4)

    def named(texts: dict[str, str]) -> Names:
        study, number, tensor, tree, *entries = (texts.get(slot, slot) for slot in slots)
        return Names(study, number, tensor, tree, tuple(dict.fromkeys(entries)), len(texts))

    return odd.map(named)


def try_names(storage: RDBStorage, names: Names) -> str:
    """Store and load a study of these names, and go on with it; then it is deleted.

    Args:
        storage: Has our tables already.

    Returns:
        ``"stored"``, or ``"refused"`` (by an error of this library's or Optuna's own).
    """
    before = _rows(storage)
    refused = _why_not_a_study(storage, names)
    if refused is not None:
        assert _rows(storage) == before, "something was stored under a name that Optuna refuses"
        return "refused"
    study = optuna.load_study(storage=storage, study_name=names.study, sampler=sampler())
    try:
        return _try_trials(storage, study, names)
    finally:
        optuna.delete_study(study_name=names.study, storage=storage)


def _why_not_a_study(storage: RDBStorage, names: Names) -> Exception | None:
    """What Optuna itself says to the study's name."""
    try:
        optuna.create_study(storage=storage, study_name=names.study)
        if names.study in optuna.get_all_study_names(storage):
            return None
        raise AssertionError(f"The study {names.study!r} is there under another name.")
    except AssertionError:
        raise
    except Exception as error:
        storage.remove_session()
        return error


def _try_trials(storage: RDBStorage, study: optuna.Study, names: Names) -> str:
    suggested: list[tuple[Any, ...]] = []

    def objective(trial: Any) -> Tensor:
        loss = names.objective(trial)
        leaves = trial.suggest_tensor(names.tensor, 2, 0.0, 1.0)
        like = {name: torch.zeros(1) for name in names.entries}
        tree = trial.suggest_tensor_like(names.tree, like, -1.0, 1.0)
        suggested.append((leaves.detach(), {k: v.detach() for k, v in tree.items()}))
        return loss

    stored = _rows(storage)
    try:
        with warnings() as said:
            study.optimize(ohg.differentiable(objective), n_trials=1)
    except Exception as error:
        storage.remove_session()
        if suggested:
            raise AssertionError(f"It was refused when it had been evaluated: {error!r}") from error
        _check_refusal(storage, study, names, error, stored)
        return "refused"
    assert said == []
    study = optuna.load_study(storage=storage, study_name=names.study, sampler=sampler())
    with warnings() as said:
        study.optimize(ohg.differentiable(objective), n_trials=1)
    assert said == []
    first, second = study.trials
    assert [t.system_attrs["hypergrad:claim"]["trajectory"] for t in (first, second)] == [0, 0]
    assert second.value < first.value
    for trial, (tensor, tree) in zip((first, second), suggested, strict=True):
        assert list(trial.params) == [names.number]
        found = load_tensors(trial, study=study)
        assert found.keys() == {names.tensor, names.tree}
        assert torch.equal(found[names.tensor], tensor)
        assert found[names.tree].keys() == set(names.entries)
        assert all(torch.equal(found[names.tree][k], tree[k]) for k in names.entries)
    _check_command(storage, names)
    return "stored"


def _check_refusal(
    storage: RDBStorage,
    study: optuna.Study,
    names: Names,
    error: Exception,
    stored: tuple[int, ...],
) -> None:
    """It names what it refuses, and nothing of it is stored."""
    parts = (names.number, names.tensor, names.tree, *names.entries)
    if isinstance(error, HypergradError):
        text = str(error)
        shown = [repr(f"{a}{b}"[:60])[1:-1] for a in ("", f"{names.tree}/") for b in parts]
        assert any(s[:40] in text for s in shown), f"{text} names none of {parts}"
    else:
        assert _refused_by_optuna(storage, names.number), repr(error)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.FAIL
    assert not trial.values
    assert _rows(storage)[-1] == stored[-1], "a tensor was stored"


def _refused_by_optuna(storage: RDBStorage, name: str) -> bool:
    study = optuna.create_study(storage=storage)
    try:
        study.ask().suggest_float(name, 0.0, 1.0)
    except Exception:
        storage.remove_session()
        return True
    finally:
        optuna.delete_study(study_name=study.study_name, storage=storage)
    return False


def _check_command(storage: RDBStorage, names: Names) -> None:
    """``show`` prints it harmlessly, and exactly as JSON."""
    url = storage.engine.url.render_as_string(hide_password=False)
    for arguments in (["--all"], ["--json"]):
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            status = cli.main(["show", url, f"--study={names.study}", *arguments])
        assert status == 0, error.getvalue()
        odd = {c for c in output.getvalue() if c != "\n" and not c.isprintable()}
        assert not odd, f"the terminal gets {odd}"
    found = json.loads(output.getvalue())
    assert found["study"] == names.study
    shown = {t["name"] for t in found["tensors"] if t["role"] == "value"}
    assert shown == {names.tensor, names.tree}


def _rows(storage: RDBStorage) -> tuple[int, ...]:
    """How many studies, parameters and tensors there are."""
    counts = ", ".join(f"(SELECT COUNT(*) FROM {table})" for table in _TABLES)
    with storage.engine.connect() as connection:
        return tuple(connection.execute(sa.text(f"SELECT {counts}")).one())
