"""Errors of workloads that their user can correct."""

from __future__ import annotations


class WorkloadError(ValueError):
    """A workload, trace or result folder is not what it must be; the message says what to do."""
