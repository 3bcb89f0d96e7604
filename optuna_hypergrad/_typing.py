"""The few types every layer speaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Params = dict[str, Tensor]
"""Named tensors: what ``named_parameters()`` gives and ``torch.func.functional_call`` takes."""

Batch = Any
"""Whatever ``BilevelProblem.inner_batch`` returns; passed on unread. ``None`` for full batch."""

Objective = Callable[[Params, Params, Batch], Tensor]
"""``(inner_params, outer_params, batch) -> scalar tensor``."""
