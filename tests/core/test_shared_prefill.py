"""A base shared by several decoders: each distinct prompt once, and the cache of a run alone."""

from __future__ import annotations

import torch
from tests.core import families

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.modules import PrefillModule
from prefillshare_train.core.packing import pack
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.core.shared_prefill import SharedPrefill
from prefillshare_train.core.spans import Conversation, Turn

LAST, RATIO = BoundaryRule.parse("last_token"), BoundaryRule.parse("ratio:0.5")


def rows(*numbers: int) -> list[Conversation]:
    made = []
    for number in numbers:
        ids = torch.randint(0, 90, (12 + number,), generator=torch.Generator().manual_seed(number))
        made.append(Conversation(tuple(ids.tolist()), (Turn(8 + number, 12 + number),)))
    return made


def same(found: PromptCache, wanted: PromptCache) -> bool:
    pairs = zip((*found.keys, *found.values), (*wanted.keys, *wanted.values), strict=True)
    return found.lengths == wanted.lengths and all(torch.allclose(a, b) for a, b in pairs)


def test_prompts_of_a_round_are_run_once() -> None:
    model = families.build("llama", torch.float64)
    alone, shared = PrefillModule(model), SharedPrefill(model)
    first = shared.prefill_packed(pack(rows(1, 2, 3), LAST))
    assert shared.ran == shared.asked == 8 + 9 + 10
    assert shared.prefill_packed(pack(rows(1, 2, 3), LAST)) is first, "not even copied"
    for chosen, rule, new in (
        (rows(2), LAST, 0),
        (rows(3, 1), LAST, 0),
        (rows(1, 2), RATIO, 0),  # a shorter cut of prompts that were run
        (rows(2, 5, 4, 5), LAST, 11 + 12),
        (rows(1, 2), BoundaryRule.parse("ratio:0"), 0),
    ):
        before = shared.ran
        batch = pack(chosen, rule)
        assert same(shared.prefill_packed(batch), alone.prefill_packed(batch))
        assert shared.ran - before == new
    shared.new_round()
    before = shared.ran
    shared.prefill_packed(pack(rows(1), LAST))
    assert shared.ran - before == 8, "the last round is forgotten"
