"""Errors of the vLLM engine that its user can correct."""

from __future__ import annotations


class VllmError(ValueError):
    """A deployment, an option or an instance is not as it must be; the message says what to do."""
