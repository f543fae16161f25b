"""The store connector's half beside vLLM's scheduler: what each request reads and writes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm.block_store import BlockStore
from prefillshare_train.engines.vllm.private_hashes import separate, share_nothing
from prefillshare_train.engines.vllm.store_keys import block_keys
from prefillshare_train.engines.vllm.store_roles import Roles

logger = logging.getLogger("vllm." + __name__)
# While all requests wait for another process, each step of vLLM's loop would ask again at once.
_PAUSE_S = 0.002


@dataclass
class Work:
    """What the worker does with blocks of one step.

    Attributes:
        loads: (block id, K/V of all layers) to copy in before the step; a file that was lent, or
            the K/V themselves where none could be.
        stores: (key, block id) to keep after it.
        unfilled: ids of blocks that were promised to a request and are not there; it must fail.
        failed: ids of the requests that wait for such blocks, in place of a step.
        ended: keys of the prompts that are complete with this step.
        writer: who began them, for `BlockStore.end`.
    """

    loads: list[tuple[int, Path | Tensor]] = field(default_factory=list)
    stores: list[tuple[str, int]] = field(default_factory=list)
    unfilled: set[int] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    ended: list[str] = field(default_factory=list)
    writer: str = ""


@dataclass
class _Plan:
    """One request.

    tokens: in its prompt. keys: of the prompt's blocks; none where it is more than token ids.
    base_length: prompt tokens that a decoder takes from the base; None for a request to the base.
    refusal: why a decoder's request must fail. saved: blocks of a base's prompt that were written.
    begun: whether others are told to wait for this prefill.
    first, blocks: what was read and from which block on. since: when it began to wait, in seconds.
    """

    tokens: int
    keys: list[str]
    base_length: int | None = None
    refusal: str | None = None
    saved: int = 0
    begun: bool = False
    first: int = 0
    blocks: list[Tensor] = field(default_factory=list)
    since: float | None = None
    counted: bool = False


class StoreScheduler:
    """Plans each request's reads and writes.

    Args:
        recompute: what a decoder's request does whose K/V are missing: prefill with its own
            weights, or fail.
        wait_s: how long it waits for a prefill under way.
    """

    def __init__(
        self,
        store: BlockStore,
        roles: Roles,
        *,
        namespace: str,
        block_size: int,
        produce: bool,
        consume: bool,
        recompute: bool,
        wait_s: float,
    ) -> None:
        self._store = store
        self._roles = roles
        self._namespace = namespace
        self._block_size = block_size
        self._produce, self._consume = produce, consume
        self._recompute = recompute
        self._wait_s = wait_s
        self._plans: dict[str, _Plan] = {}
        self._prefills: Counter[str] = Counter()  # under way, by the prompt's last key
        self._work = Work(writer=store.id)
        self.counts: Counter[str] = Counter()

    def add(self, request: Any) -> None:
        """Plan a request that has arrived."""
        plain = bool(request.prompt_token_ids) and not (
            request.mm_features or request.prompt_embeds is not None or request.resumable
        )
        keys: list[str] = []
        if plain:
            tokens = request.prompt_token_ids
            keys = block_keys(self._namespace, tokens, self._block_size, request.cache_salt)
        plan = self._plans[request.request_id] = _Plan(request.num_prompt_tokens, keys)
        adapter = request.lora_request
        try:
            boundary = self._roles.boundary(adapter.lora_path if adapter else None)
            if boundary is None:
                if self._produce and keys:
                    plan.begun = True
                    self._prefills[keys[-1]] += 1
                    self._store.begin(keys[-1])
                return
            plan.base_length = plan.tokens - 1
            self._check_readable(request, plain)
            plan.base_length = boundary.base_length(request.prompt_token_ids)
        except (ContractError, ValueError) as error:
            # A promise of no token could not fail, so of one token all is promised.
            plan.base_length = max(1, plan.tokens - 1)
            plan.refusal = str(error)
        # vLLM would leave the connector's tokens out with it, and prefill with the decoder.
        request.skip_reading_prefix_cache = False
        # Blocks are shared where only the base's K/V can be in them.
        exact = plan.refusal is None and not self._recompute
        shared = plan.base_length // self._block_size if exact else 0
        separate(request, shared, self._block_size)

    def _check_readable(self, request: Any, plain: bool) -> None:
        if not plain:
            raise ValueError("a prompt of more than token ids is not in the store")
        parameters = request.sampling_params
        if parameters is not None and parameters.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: the base's part of the prompt is not run here")
        if not self._consume:
            raise ValueError("kv_role is kv_producer, and decoders read: use kv_both")

    def matched(self, request: Any, computed: int) -> tuple[int | None, bool]:
        """How many prompt tokens beyond `computed` come from the store; None to be asked again.

        A request that must fail is promised all it needs, which then does not come. The second
        value is whether vLLM is to wait for them before it runs the request, as it must where it
        is promised the whole prompt.
        """
        plan = self._plans[request.request_id]
        if plan.base_length is None:
            return self._matched_by_base(plan, computed), False
        tokens = self._matched_by_decoder(request, plan, computed)
        return tokens, plan.refusal is not None and plan.base_length == plan.tokens

    def _matched_by_decoder(self, request: Any, plan: _Plan, computed: int) -> int | None:
        assert plan.base_length is not None
        wanted = plan.base_length - computed
        if wanted <= 0:
            return 0
        if plan.refusal is not None:
            self._refuse(request, plan, plan.refusal)
            return wanted
        end = -(-plan.base_length // self._block_size)
        # Asked in this order: a prefill that ends in between has left its blocks.
        under_way = self._store.pending(plan.keys[-1])
        if not (under_way and not self._store.has(plan.keys[end - 1])):
            self._read(plan, computed, end)
            if plan.first + len(plan.blocks) == end:
                self._end_wait(plan)
                return wanted
        if under_way and self._goes_on_waiting(plan):
            return None
        self._end_wait(plan)
        held = plan.first + len(plan.blocks)
        missing = (
            f"K/V of {plan.base_length - held * self._block_size} of {plan.tokens} prompt "
            "tokens are not in the store; have the base prefill the prompt first"
        )
        if not self._recompute:
            plan.refusal = missing
            share_nothing(request)
            self._refuse(request, plan, missing)
            return wanted
        if not plan.counted:
            plan.counted = True
            self.counts["missed_requests"] += 1
            logger.warning(
                "request %s prefills with the DECODER's weights, which it was not trained for: %s",
                request.request_id,
                missing,
            )
        return max(0, held * self._block_size - computed)

    def _matched_by_base(self, plan: _Plan, computed: int) -> int:
        if not (self._consume and plan.keys):
            return 0
        self._read(plan, computed, len(plan.keys))
        tokens = min((plan.first + len(plan.blocks)) * self._block_size, plan.tokens - 1)
        return max(0, tokens - computed)

    def _read(self, plan: _Plan, computed: int, end: int) -> None:
        first = computed // self._block_size
        if plan.first != first or first + len(plan.blocks) < end:
            plan.first = first
            plan.blocks = self._store.read(plan.keys[first:end])

    def _goes_on_waiting(self, plan: _Plan) -> bool:
        now = time.monotonic()
        if plan.since is None:
            plan.since = now
            self.counts["waited_requests"] += 1
        return now - plan.since < self._wait_s

    def _end_wait(self, plan: _Plan) -> None:
        if plan.since is not None:
            self.counts["waited_seconds"] += time.monotonic() - plan.since  # type: ignore[assignment]
            plan.since = None

    def _refuse(self, request: Any, plan: _Plan, why: str) -> None:
        if not plan.counted:
            plan.counted = True
            self.counts["refused_requests"] += 1
            logger.error("request %s fails: %s", request.request_id, why)

    def allocated(self, request: Any, block_ids: list[int], loaded_tokens: int) -> None:
        """Take note of the blocks that a request got, of whose tokens so many were promised."""
        plan = self._plans[request.request_id]
        blocks, plan.blocks = plan.blocks, []
        if plan.refusal is not None:
            if loaded_tokens:
                assert plan.base_length is not None
                end = -(-plan.base_length // self._block_size)
                first = (plan.base_length - loaded_tokens) // self._block_size
                self._work.unfilled.update(block_ids[first:end])
                if plan.base_length == plan.tokens:
                    self._work.failed.add(request.request_id)
            return
        if loaded_tokens:
            # vLLM copies what goes to a worker of another process: files are lent in place of K/V.
            self._work.loads += [
                (block_id, self._store.lend(key) or block)
                for block_id, key, block in zip(
                    block_ids[plan.first :], plan.keys[plan.first :], blocks, strict=False
                )
            ]
            self.counts["loaded_tokens"] += loaded_tokens
            self.counts["loaded_blocks"] += len(blocks)
            self.counts["loaded_bytes"] += sum(block.nbytes for block in blocks)
        if plan.base_length is not None and not plan.counted:
            plan.counted = True
            self.counts["hit_requests"] += 1

    def step(self, scheduled: Any) -> Work:
        """The worker's part of a step.

        Args:
            scheduled: vLLM's `SchedulerOutput`.
        """
        work, self._work = self._work, Work(writer=self._store.id)
        for request_id, computed in _computed(scheduled):
            plan = self._plans.get(request_id)
            if plan is None or plan.base_length is not None or not (self._produce and plan.keys):
                continue
            if plan.saved == len(plan.keys):
                continue
            end = computed + scheduled.num_scheduled_tokens[request_id]
            done = end // self._block_size
            if end >= plan.tokens:
                done = len(plan.keys)
                if self._ends(plan):
                    work.ended.append(plan.keys[-1])
            (ids,) = scheduled.kv_connector_block_state.resolve_block_ids(request_id)
            # What this step writes may evict: not what it builds on, which a decoder reads next.
            there = self._store.touch(plan.keys[plan.saved : done])
            for index in range(plan.saved, done):
                if plan.keys[index] not in there:
                    work.stores.append((plan.keys[index], ids[index]))
            plan.saved = max(plan.saved, done)
        if not scheduled.total_num_scheduled_tokens and any(
            plan.since is not None for plan in self._plans.values()
        ):
            time.sleep(_PAUSE_S)
        return work

    def finished(self, request: Any) -> None:
        """Forget a request that has ended, in whatever way."""
        plan = self._plans.pop(request.request_id, None)
        if plan is not None and self._ends(plan):
            self._store.end(plan.keys[-1])

    def _ends(self, plan: _Plan) -> bool:
        """Note that a prefill is over, once; whether it was the last one of its prompt."""
        if not plan.begun:
            return False
        plan.begun = False
        key = plan.keys[-1]
        self._prefills[key] -= 1
        if self._prefills[key]:
            return False
        del self._prefills[key]
        return True


def _computed(scheduled: Any) -> Iterable[tuple[str, int]]:
    """Each scheduled request with the tokens that it had before this step."""
    for new in scheduled.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = scheduled.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
