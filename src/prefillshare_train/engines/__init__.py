"""Adapters that let existing serving engines share a prefill."""
