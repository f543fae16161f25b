"""Plans of the base's passes: the same cache, whatever is shared and however it is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core import families

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.core.packing import pack
from prefillshare_train.core.prefill_plan import PrefillPlan, plan_prefill
from prefillshare_train.core.spans import Conversation, Turn

LAST = BoundaryRule.parse("last_token")


def rows(*prompts: Sequence[int]) -> list[Conversation]:
    """One-turn conversations; the last prompt token is the decoder's, so one more is added."""
    return [
        Conversation((*prompt, 5, 6, 7), (Turn(len(prompt) + 1, len(prompt) + 3),))
        for prompt in prompts
    ]


prompt_lists = st.lists(st.lists(st.integers(0, 1), max_size=12), min_size=1, max_size=7)


@settings(max_examples=300, deadline=None)
@given(
    prompts=prompt_lists,
    share_from=st.sampled_from([None, 1, 3]),
    chunk=st.sampled_from([None, 1, 2, 5]),
)
def test_every_position_gets_its_own_tokens_kv_once(
    prompts: list[list[int]], share_from: int | None, chunk: int | None
) -> None:
    plan = plan_prefill(prompts, share_from=share_from, chunk_tokens=chunk)
    row = [(tuple(prompt[: i + 1])) for prompt in prompts for i in range(len(prompt))]
    filled: dict[int, tuple[int, ...]] = {}  # offset -> the text that its K/V depend on
    for one in plan.passes:
        assert chunk is None or one.tokens <= chunk
        segments = [
            (group.query_length, start, group.past_length)
            for group in one.groups
            for start in group.past_starts
        ]
        for (start, stop), (length, past, past_length) in zip(one.spans, segments, strict=True):
            assert stop - start == length
            assert start == past + past_length, "a stretch goes on where its past ends"
            assert all(past + i in filled for i in range(past_length))
            for i in range(start, stop):
                assert i not in filled, "a position is run twice"
                filled[i] = row[i]
        for source, target, length in one.copies:
            for i in range(length):
                assert target + i not in filled
                filled[target + i] = filled[source + i]
    assert [filled[i] for i in range(len(row))] == row
    assert plan.tokens + plan.shared_tokens == len(row)


def shared(*prompts: Sequence[int], share_from: int = 2) -> PrefillPlan:
    return plan_prefill(prompts, share_from=share_from)


def test_what_is_saved() -> None:
    system = [7] * 10
    assert shared([*system, 1], [*system, 2, 2], [*system, 3]).shared_tokens == 20
    assert shared(system, system).shared_tokens == 10
    assert shared([1, 2, 3], [4, 5, 6]).is_plain
    assert shared([7, 7, 1], [7, 7, 2], share_from=3).is_plain
    two = shared([*system, 1], [*system, 2], [*[8] * 6, 1], [*[8] * 6, 2])
    assert two.shared_tokens == 16


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize(("share_from", "chunk"), [(8, None), (None, 7), (8, 7), (8, 1)])
def test_the_cache_is_that_of_one_pass(name: str, share_from: int | None, chunk: int) -> None:
    base = PrefillModule(families.build(name, torch.float64))
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(8, 90, (n,), generator=generator).tolist()  # noqa: E731
    system = draw(21)
    conversations = rows([*system, *draw(5)], draw(19), [*system, *draw(30)], system, draw(3))
    plain = base.prefill_packed(pack(conversations, LAST))
    batch = pack(conversations, LAST, share_from=share_from, chunk_tokens=chunk)
    assert batch["layout"].prefill.shared_tokens == (42 if share_from else 0)
    planned = base.prefill_packed(batch)
    assert planned.lengths == plain.lengths
    for found, wanted in zip(
        (*planned.keys, *planned.values), (*plain.keys, *plain.values), strict=True
    ):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_kv_can_be_kept_elsewhere_than_they_were_computed() -> None:
    base = PrefillModule(families.build("llama", torch.float64))
    base.keep_on = torch.device("meta")
    cache = base.prefill_packed(pack(rows([9] * 9), LAST))
    assert {t.device.type for t in (*cache.keys, *cache.values)} == {"meta"}
