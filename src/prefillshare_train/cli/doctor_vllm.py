"""The Python with vLLM that `prefillshare vllm up` would take."""

from __future__ import annotations

from collections.abc import Iterator

from prefillshare_train.cli.doctor_packages import Finding
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.vllm_python import find_python, look_into


def vllm_python() -> Iterator[Finding]:
    """Whether there is one, tested, and free of packages that keep it from starting.

    Nobody needs vLLM to train, so that nothing here is to be repaired: faults are notes.
    """
    try:
        python = look_into(find_python(None))
    except VllmError as error:
        yield Finding("note", "vLLM", str(error), "name its Python with --vllm-python")
        return
    if python.distribution is None:
        yield Finding("ok", "vLLM", "not here, and only `prefillshare vllm` needs it")
        return
    yield Finding("ok", "vLLM", f"{python.distribution} {python.vllm} in {python.path}")
    try:
        warnings = python.require(nixl=False)
    except VllmError as error:
        yield Finding("note", "vLLM", str(error))
        return
    for warning in warnings:
        yield Finding("note", "vLLM", warning, "docs/vllm.md names the versions that were tested")
    if "nixl" not in python.versions:
        yield Finding("ok", "nixl", "not here: `prefillshare vllm up --route nixl` needs it")
