"""scikit-learn's callbacks, which follow a search from evaluation to evaluation."""

from __future__ import annotations

from typing import Any


class SearchContext:
    """The context of evaluations that come one after the other, each numbered from 0 on by scikit-learn.

    Args:
        root: Of the search and its refit.
        search: Whose evaluations they are.
    """

    def __init__(self, root: Any, search: Any) -> None:
        made = root.subcontext(task_name="search", max_subtasks=None, sequential_subtasks=False)
        self._context = made.call_on_fit_task_begin(estimator=search)
        self._search, self._count = search, 0

    def subcontext(self, *, task_name: str, task_id: int) -> Any:
        """Of an evaluation, with a number of its own."""
        self._count += 1
        return self._context.subcontext(task_name=task_name, task_id=self._count - 1)

    def end(self) -> None:
        self._context.call_on_fit_task_end(estimator=self._search)
