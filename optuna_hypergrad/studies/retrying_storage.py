"""A storage that waits for its server to come back.

Plain Optuna gives up at the first lost connection. Here each call is tried again, and what was done
although its answer was lost is recognized: a trial is created, and a waiting one claimed, together with
a key by which it is found again (a system attribute that readers are not shown); a new study, a final state and a removal are compared with what is
there. Everything else writes the same value again.
"""

from __future__ import annotations

import copy
import sys
import time
import uuid
from collections.abc import Callable, Container, Sequence
from typing import Any, ClassVar, TypeVar

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from .. import _optuna
from .._errors import ConnectionLostError
from ..stores import (
    claim_waiting_trial,
    find_created_trial,
    is_lost,
    plain_rdb,
    retry_while_busy,
    set_patience,
    unwrap_rdb,
    without_password,
)

T = TypeVar("T")

KEY, REMOTE_KEY = "hypergrad:request", "hypergrad:request:remote"
"""The second is of a client of a gRPC proxy, whose server may have the first."""


class _AnswerLostError(ConnectionError):
    """The connection broke. No error of SQLAlchemy: some of those are tried again inside of Optuna."""


class RetryingStorage(BaseStorage, _optuna.BaseHeartbeat):
    """A storage whose calls wait while its database, or its gRPC proxy, is away.

    ::

        storage = RetryingStorage("postgresql+psycopg://user@host/db", patience=3600)
        study = optuna.create_study(storage=storage, sampler=HypergradientSampler())

    A warning says when the connection is lost, and when it is back. Once the patience is spent, calls fail at
    once until the database answers again.

    Args:
        storage: A URL as Optuna takes it, an ``RDBStorage``, or a ``GrpcStorageProxy``.
        patience: Seconds for which the database may be away; infinity to wait forever.

    Raises:
        ConnectionLostError: by any call, if the database does not come back in time. What was stored is
            still there.
        ValueError: for a negative patience.
    """

    passes_calls_through: ClassVar[bool] = True

    def __init__(self, storage: str | BaseStorage, patience: float = 600.0) -> None:
        if not patience >= 0:
            raise ValueError(f"patience={patience!r} must be a number of seconds of at least 0.")
        self.patience = patience
        self._away_since: float | None = None  # once patience was spent, until there is an answer
        self._created: dict[str, int | None] = {}  # by the keys of creations that are under way
        self._backend = self._call(lambda: optuna.storages.get_storage(storage))
        self._attach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._away_since = None  # another machine's clock
        self._attach()

    def __repr__(self) -> str:
        rdb = unwrap_rdb(self)
        where = (
            without_password(rdb.engine.url) if rdb is not None else type(self._backend).__name__
        )
        return f"{type(self).__name__}({where}, patience={self.patience:g})"

    def _attach(self) -> None:
        self._key = REMOTE_KEY if plain_rdb(self) is None else KEY
        rdb = unwrap_rdb(self)
        if rdb is not None:
            set_patience(rdb, self.patience)
            sa.event.listen(rdb.engine, "handle_error", _tell_lost_answers)

    def _call(self, action: Callable[[], T], settle: Callable[[], T | None] | None = None) -> T:
        try:
            found = retry_while_busy(
                action, patience=self.patience, settle=settle, away_since=self._away_since
            )
        except ConnectionLostError:
            self._away_since = time.monotonic() - self.patience
            raise
        self._away_since = None
        return found

    # Calls that must not be carried out twice.

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        key = uuid.uuid4().hex
        if template_trial is None:
            template = create_trial(state=TrialState.RUNNING)
        else:
            template = copy.copy(template_trial)
        template.system_attrs = {**template.system_attrs, self._key: key}
        rdb = plain_rdb(self)

        def created() -> int | None:
            if rdb is not None:
                return find_created_trial(rdb, study_id, self._key, key)
            for trial in self._backend.get_all_trials(study_id, deepcopy=False):
                self._shown(trial)
            return self._created[key]

        self._created[key] = None
        try:
            return self._call(lambda: self._backend.create_new_trial(study_id, template), created)
        finally:
            del self._created[key]

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        rdb = plain_rdb(self)
        if state == TrialState.RUNNING and rdb is not None:
            key = {self._key: uuid.uuid4().hex}
            if self._call(lambda: claim_waiting_trial(rdb, trial_id, key)):
                return True

        def finished() -> bool | None:
            trial = self._backend.get_trial(trial_id)
            same = trial.state == state and (values is None or trial.values == list(values))
            return True if state.is_finished() and same else None

        return self._call(
            lambda: self._backend.set_trial_state_values(trial_id, state, values), finished
        )

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        name = f"no-name-{uuid.uuid4()}" if study_name is None else study_name

        def created() -> int | None:
            try:
                study_id = self._backend.get_study_id_from_name(name)
            except KeyError:
                return None
            empty = not self._backend.get_all_trials(study_id, deepcopy=False)
            same = self._backend.get_study_directions(study_id) == list(directions)
            return study_id if empty and same else None

        return self._call(lambda: self._backend.create_new_study(directions, name), created)

    def delete_study(self, study_id: int) -> None:
        def deleted() -> bool | None:
            try:
                self._backend.get_study_name_from_id(study_id)
            except KeyError:
                return True
            return None

        def delete() -> bool:
            self._backend.delete_study(study_id)
            return True

        self._call(delete, deleted)

    # Calls that write the same again.

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._call(lambda: self._backend.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._call(lambda: self._backend.set_study_system_attr(study_id, key, value))

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        self._call(
            lambda: self._backend.set_trial_param(
                trial_id, param_name, param_value_internal, distribution
            )
        )

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        self._call(
            lambda: self._backend.set_trial_intermediate_value(trial_id, step, intermediate_value)
        )

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._call(lambda: self._backend.set_trial_user_attr(trial_id, key, value))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._call(lambda: self._backend.set_trial_system_attr(trial_id, key, value))

    # Calls that read.

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._call(lambda: self._backend.get_study_id_from_name(study_name))

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._call(lambda: self._backend.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._call(lambda: self._backend.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._call(lambda: self._backend.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._call(lambda: self._backend.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[Any]:
        return self._call(lambda: self._backend.get_all_studies())

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        return self._call(
            lambda: self._backend.get_trial_id_from_study_id_trial_number(study_id, trial_number)
        )

    def get_trial_number_from_id(self, trial_id: int) -> int:
        return self._call(lambda: self._backend.get_trial_number_from_id(trial_id))

    def get_trial_param(self, trial_id: int, param_name: str) -> float:
        return self._call(lambda: self._backend.get_trial_param(trial_id, param_name))

    def get_trial(self, trial_id: int) -> FrozenTrial:
        giving_up = (
            isinstance(sys.exc_info()[1], ConnectionLostError) and _optuna.asked_at_its_end()
        )
        try:
            return self._shown(self._call(lambda: self._backend.get_trial(trial_id)))
        except ConnectionLostError:
            if not giving_up:
                raise
            # Study.optimize asks for the trial in the middle of its own end. Without any answer, or with a
            # trial in another state, its end is an UnboundLocalError or an AssertionError.
            return create_trial(state=TrialState.PRUNED)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        found = self._call(lambda: self._backend.get_all_trials(study_id, deepcopy, states))
        return [self._shown(trial) for trial in found]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        return self._shown(self._call(lambda: self._backend.get_best_trial(study_id)))

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        found = self._call(lambda: self._backend.get_trial_system_attrs(trial_id))
        return {key: value for key, value in found.items() if key != self._key}

    def remove_session(self) -> None:
        self._backend.remove_session()

    # Optuna's heartbeat, where the storage has one.

    @property
    def _heart(self) -> _optuna.BaseHeartbeat | None:
        return self._backend if isinstance(self._backend, _optuna.BaseHeartbeat) else None

    def record_heartbeat(self, trial_id: int) -> None:
        if (heart := self._heart) is not None:
            self._call(lambda: heart.record_heartbeat(trial_id))

    def get_heartbeat_interval(self) -> int | None:
        return None if self._heart is None else self._heart.get_heartbeat_interval()

    def get_heartbeat_stale_trial_callback(self) -> Callable[[Study, FrozenTrial], None] | None:
        return None if self._heart is None else self._heart.get_heartbeat_stale_trial_callback()

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        if (heart := self._heart) is None:
            return []
        return self._call(lambda: _optuna.stale_trial_ids(heart, study_id))

    def _shown(self, trial: FrozenTrial) -> FrozenTrial:
        key = trial.system_attrs.get(self._key)
        if isinstance(key, str) and key in self._created:
            self._created[key] = _optuna.trial_id_of(trial)
        trial.system_attrs.pop(self._key, None)  # also in the cache of a gRPC proxy
        return trial


def _tell_lost_answers(context: sa.engine.ExceptionContext) -> _AnswerLostError | None:
    if getattr(context, "is_pre_ping", False):
        return None  # nothing is lost: the pool makes another one
    error = context.sqlalchemy_exception or context.original_exception
    if not context.is_disconnect and not is_lost(error):
        return None
    context.is_disconnect = True  # also where a server says that it is about to go
    return _AnswerLostError(f"{type(context.original_exception).__name__}: the connection broke")
