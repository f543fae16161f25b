"""Errors of the data pipeline. All are `ValueError`s whose text is meant for the user."""

from __future__ import annotations


class DataError(ValueError):
    """The data, or what the recipe says about it, cannot be used as it is."""


class RowError(DataError):
    """One row is bad.

    Attributes:
        origin: `file:line` or `file:row n`, where the row lies.
        found: what is wrong with it.
        fix: what to do.
    """

    def __init__(self, origin: str, found: str, fix: str) -> None:
        super().__init__(f"{origin}: {found}. {fix}")
        self.origin = origin
        self.found = found
        self.fix = fix


class SeamError(RowError):
    """The prompt's token ids are not a prefix of the prompt-and-response's token ids."""


def shorten(value: object, limit: int = 80) -> str:
    """`repr` of a value, cut in the middle to at most about `limit` characters."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
