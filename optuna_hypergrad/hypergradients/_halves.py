"""A compiled function with a graph, whose way back takes over what was dear to compute on the way forth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .compiled import compiled_whole


def can_be_cut() -> bool:
    """Whether this version of torch can be told where to cut."""
    import torch._inductor.config as inductor

    return hasattr(inductor, "custom_partitioner_fn")


def compiled_in_halves(function: Callable[..., Any]) -> Callable[..., Any]:
    """As :func:`compiled_whole`, for calls that keep a graph; needs :func:`can_be_cut`."""
    from .cut_after_products import AfterDearOperations  # the compiler comes with it

    return compiled_whole(function, custom_partitioner_fn=AfterDearOperations())


@contextmanager
def graphs_kept() -> Iterator[None]:
    """Around calls of compiled functions, and around ways back that may be gone again: nothing that is saved is written to."""
    import torch._functorch.config as functorch

    # A thread has settings of its own.
    with functorch.patch(donated_buffer=False), torch.autograd.set_multithreading_enabled(False):
        yield


@contextmanager
def no_word_on_what_is_no_leaf() -> Iterator[None]:
    """torch warns that it looks for the ``.grad`` of a tensor that it compiles for, where it means to hide that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        yield
