"""Rows that wait, end, take another's place or read one prompt answer as they would alone."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from tests.core import families
from tests.core.generating import NEW, cut, plainly, prompts
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
)

import prefillshare_train.core.generate as core_generate
from prefillshare_train.core.generate import generate
from prefillshare_train.core.modules import PrefillModule


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_waiting_rows_take_the_places_of_ended_ones_and_answer_the_same(
    family: str, batch_size: int
) -> None:
    model, rows = families.build(family, torch.float64), prompts() + prompts(seed=1)
    cache = PrefillModule(model).prefill(cut(rows))
    whole = generate(model, cache, rows, max_new_tokens=NEW, stop_ids=())
    # Stop tokens that end rows at different steps, so that places fall free one by one.
    stops = {answer[3 + 2 * n % 15] for n, answer in enumerate(whole)}
    ends = [next((n for n, t in enumerate(a, 1) if t in stops), NEW) for a in whole]
    expected = [answer[:end] for answer, end in zip(whole, ends, strict=True)]
    assert len(set(ends)) > 2
    assert generate(model, cache, rows, max_new_tokens=NEW, stop_ids=sorted(stops)) == expected
    running: set[int] = set()
    most = 0

    def on_token(row: int, token: int) -> None:
        nonlocal most
        running.add(row)
        most = max(most, len(running))
        if token in stops or len(expected[row]) == NEW:
            running.discard(row)

    found = generate(
        model,
        cache,
        rows,
        max_new_tokens=NEW,
        stop_ids=sorted(stops),
        batch_size=batch_size,
        on_token=on_token,
    )
    assert found == expected
    assert most <= batch_size


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_rows_that_read_one_prompt_at_several_cuts_answer_as_they_would_alone(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several decoders' rows over one prefill, admitted in as many passes as their length asks."""
    monkeypatch.setattr(core_generate, "_ADMITTED_TOKENS", 20)
    model, rows = families.build(family, torch.float64), prompts()
    prefill = PrefillModule(model)
    cache = prefill.prefill(cut(rows))
    readers = [4, 1, 1, 0, 4, 2, 4]
    lengths = [49, 16, 5, 0, 12, 0, 49]
    asked = [rows[reader] for reader in readers]
    runs: list[list[list[int]]] = []

    def running(owners: list[list[int]]) -> contextlib.AbstractContextManager[None]:
        runs.append(owners)
        return contextlib.nullcontext()

    answers = generate(
        model,
        cache.rows(readers, lengths),
        asked,
        max_new_tokens=NEW,
        stop_ids=(),
        batch_size=3,
        running=running,
    )
    assert answers == [plainly(families.reference_copy(model), ids) for ids in asked]
    packed = [owners[0] for owners in runs if len(owners) == 1 and len(owners[0]) > 1]
    assert max(map(len, packed)) <= 50
    assert len(packed) > 3
    for owners in runs:
        assert {len(row) for row in owners} == {1} or len(owners) == 1
    tails = [len(ids) - length for ids, length in zip(asked, lengths, strict=True)]
    counts = Counter(row for owners in runs for part in owners for row in part)
    # Its tail, a pass a later token, and the head a token.
    assert counts == {row: tail + (NEW - 1) + NEW for row, tail in enumerate(tails)}


def test_an_ended_row_leaves_nothing_in_its_place() -> None:
    """Masked or not, 0 * inf is no number: a row that overflowed spoils none that comes after."""
    model, (short, *_, long) = families.build("llama", torch.float64), prompts()
    rows = [long, long, short]
    cache = PrefillModule(model).prefill(cut(rows))
    sound = generate(model, cache, rows, max_new_tokens=NEW, stop_ids=())
    for layer in cache.values:
        layer[:, cache.starts[1] : cache.starts[2]] = float("inf")
    found = generate(
        model,
        cache,
        rows,
        max_new_tokens=NEW,
        stop_ids=(),
        batch_size=2,
        should_stop=lambda row, _: row == 1,
    )
    assert (found[0], found[2]) == (sound[0], sound[2])


def test_a_caller_can_end_rows_by_what_they_say() -> None:
    model, rows = families.build("llama", torch.float64), prompts()
    cache = PrefillModule(model).prefill(cut(rows))
    whole = generate(model, cache, rows, max_new_tokens=NEW, stop_ids=())
    found = generate(
        model,
        cache,
        rows,
        max_new_tokens=NEW,
        stop_ids=(),
        should_stop=lambda row, response: len(response) == row + 1,
    )
    assert found == [answer[: n + 1] for n, answer in enumerate(whole)]


def test_processors_and_waiting_rows_are_refused_together() -> None:
    model, rows = families.build("llama", torch.float32), prompts()
    cache = PrefillModule(model).prefill(cut(rows))
    processors = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(1, 2, [0])])
    with pytest.raises(ValueError, match="pass 2 prompts at a time"):
        generate(
            model,
            cache,
            rows,
            max_new_tokens=2,
            stop_ids=(),
            processors=processors,
            batch_size=2,
        )
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        generate(model, cache, rows, max_new_tokens=2, stop_ids=(), batch_size=0)
