"""All benchmark tasks: ``TASKS[name]()`` builds one; the objective is plain, differentiable torch.

``DEVELOPMENT`` tasks chose the default rule, ``CHECK`` tasks were written after it was fixed.
"""

from __future__ import annotations

import tasks_check
import tasks_data
import tasks_synthetic
from task import TASKS, Task

CHECK = [n for n, b in TASKS.items() if b.__wrapped__.func.__module__ == tasks_check.__name__]  # type: ignore[attr-defined]
DEVELOPMENT = [n for n in TASKS if n not in CHECK]

__all__ = ["CHECK", "DEVELOPMENT", "TASKS", "Task", "tasks_check", "tasks_data", "tasks_synthetic"]
