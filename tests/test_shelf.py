"""Tensors in blocks of memory: equal copies, which nothing else writes to."""

from __future__ import annotations

import torch
from problems import randn

from optuna_hypergrad.hypergradients._shelf import Shelf


def test_copies_are_equal_and_stand_alone() -> None:
    shelf = Shelf(1e6)
    tensors = [
        randn(70, 30, seed=1),
        randn(2001, seed=2).float(),
        torch.arange(5000),
        randn(60, 40, seed=3).T,
        randn(3, seed=4),
        randn(400, 1000, seed=5),  # more than was foreseen
    ]
    copies = [shelf.put(t) for t in tensors]
    known = [t.clone() for t in tensors]
    for t in tensors[:3]:
        t.zero_()
    for copy, truth in zip(copies, known, strict=True):
        assert copy.dtype == truth.dtype
        assert torch.equal(copy, truth)
    small, turned = copies[4], copies[3]
    assert small is tensors[4]
    assert turned is tensors[3]
