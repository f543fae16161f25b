"""What goes wrong between a decoder and the hub."""

from __future__ import annotations


class HubError(ValueError):
    """A decoder cannot be found, written, pushed or run as asked; the message says what to do."""
