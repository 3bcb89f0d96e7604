"""Optuna's own tests of a storage pass on a database that carries our tensors, also through RetryingStorage."""

from storage_conformance import TestRetryingSQLite, TestSQLite

__all__ = ["TestRetryingSQLite", "TestSQLite"]
