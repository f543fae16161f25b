"""The scheduler's half of the store connector, over stand-ins for vLLM's requests and steps."""

from __future__ import annotations

import hashlib
import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm.block_store import BlockStore
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.prefill_id import Boundary
from prefillshare_train.engines.vllm.store_scheduler import StoreScheduler, Work
from prefillshare_train.engines.vllm.store_worker import StoreWorker

BLOCK = 4
LAYERS, BLOCKS = 2, 16
TOKENS = list(range(100, 111))
"""Two whole blocks and three tokens."""


class FakeRequest:
    """What the connector touches of vLLM's `Request`, hashes included."""

    def __init__(self, name: str, tokens: list[int], adapter: str | None = None, **values: Any):
        self.request_id = name
        self.prompt_token_ids: list[int] | None = tokens
        self.num_prompt_tokens = len(tokens)
        self.all_tokens = list(tokens)
        self.lora_request = SimpleNamespace(lora_path=adapter) if adapter else None
        self.cache_salt: str | None = None
        self.mm_features: list[Any] = []
        self.prompt_embeds = None
        self.resumable = False
        self.sampling_params = SimpleNamespace(prompt_logprobs=None)
        self.skip_reading_prefix_cache = False
        self.block_hashes: list[bytes] = []
        self._block_hasher: Any = _hasher
        for key, value in values.items():
            setattr(self, key, value)
        self.update_block_hashes()

    @property
    def num_tokens(self) -> int:
        return len(self.all_tokens)

    def update_block_hashes(self) -> None:
        if self._block_hasher is not None:
            self.block_hashes.extend(self._block_hasher(self))

    def answer(self, count: int) -> None:
        self.all_tokens += [7] * count
        self.update_block_hashes()


def _hasher(request: FakeRequest) -> list[bytes]:
    """As vLLM's: chained, and apart for each adapter."""
    parent = request.block_hashes[-1] if request.block_hashes else b""
    found = []
    for start in range(len(request.block_hashes) * BLOCK, request.num_tokens - BLOCK + 1, BLOCK):
        adapter = request.lora_request.lora_path if request.lora_request else ""
        text = f"{adapter} {request.all_tokens[start : start + BLOCK]}".encode()
        parent = hashlib.sha256(parent + text).digest()
        found.append(parent)
    return found


class FakeRoles:
    """Adapters a and b take all but the last token from the base; c all but its header."""

    def boundary(self, lora_path: str | None) -> Boundary | None:
        if lora_path is None:
            return None
        if lora_path == "c":
            return Boundary(BoundaryRule("generation_prompt"), (1, 2))
        if lora_path in ("a", "b"):
            return Boundary(BoundaryRule("last_token"))
        raise ContractError("it was trained over another base")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    made = BlockStore(tmp_path, "ns", 1 << 20)
    yield made
    made.close()


def scheduler(store: BlockStore, **values: Any) -> StoreScheduler:
    settings = {"produce": True, "consume": True, "recompute": False, "wait_s": 60.0}
    roles: Any = FakeRoles()
    return StoreScheduler(store, roles, namespace="ns", block_size=BLOCK, **(settings | values))


def step(half: StoreScheduler, ids: dict[str, list[int]], **scheduled: tuple[int, int]) -> Work:
    """One step in which each request has (tokens computed, tokens scheduled)."""
    new = [
        SimpleNamespace(req_id=name, num_computed_tokens=computed)
        for name, (computed, _) in scheduled.items()
    ]
    counts = {name: count for name, (_, count) in scheduled.items()}
    return half.step(
        SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens=counts,
            total_num_scheduled_tokens=sum(counts.values()),
            kv_connector_block_state=SimpleNamespace(resolve_block_ids=lambda name: (ids[name],)),
        )
    )


def caches(fill: float) -> dict[str, torch.Tensor]:
    return {f"layer{n}": torch.full((BLOCKS, 1, BLOCK, 2), fill + n) for n in range(LAYERS)}


def prefill(half: StoreScheduler, store: BlockStore, tokens: list[int] = TOKENS) -> None:
    """A request to the base runs through, and its blocks are stored."""
    request = FakeRequest("base", tokens)
    half.add(request)
    half.matched(request, 0)
    half.allocated(request, [1, 2, 3], 0)
    worker = StoreWorker(store, BLOCKS)
    worker.register(caches(5.0))
    worker.save(step(half, {"base": [1, 2, 3]}, base=(0, len(tokens))))
    half.finished(request)


def test_all_but_the_last_token_come_from_the_store(store: BlockStore) -> None:
    half = scheduler(store)
    prefill(half, store)
    for adapter in "ab":
        request = FakeRequest(adapter, TOKENS, adapter)
        half.add(request)
        assert half.matched(request, 0) == (10, False)
        half.allocated(request, [4, 5, 6], 10)
        work = step(half, {}, **{adapter: (10, 1)})
        assert [block_id for block_id, _ in work.loads] == [4, 5, 6]
        assert work.stores == [], "a decoder writes nothing"
        assert not work.unfilled
        worker = StoreWorker(store, BLOCKS)
        layers = caches(0.0)
        worker.register(layers)
        worker.load(work)
        assert layers["layer1"][4:7].eq(6.0).all()
        assert layers["layer1"][7:].eq(1.0).all()
        assert list(store._folder.glob("*.tmp")) == [], "loans are given back"
    assert half.counts["hit_requests"] == 2
    assert half.counts["loaded_tokens"] == 20


def test_a_longer_prompt_does_not_evict_what_it_builds_on(store: BlockStore) -> None:
    """The base has its beginning in its own cache and reads nothing: those files look unused."""
    half = scheduler(store)
    prefill(half, store)
    one = store._used() // 3
    store._budget = store._used() + 4 * one
    for number in range(4):
        store.write(f"other{number}", torch.full((LAYERS, 1, BLOCK, 2), 0.0))
    longer = [*TOKENS, *range(200, 205)]
    request = FakeRequest("longer", longer)
    half.add(request)
    half.matched(request, 8)
    half.allocated(request, [1, 2, 3, 4], 0)
    worker = StoreWorker(store, BLOCKS)
    worker.register(caches(5.0))
    worker.save(step(half, {"longer": [1, 2, 3, 4]}, longer=(8, 8)))
    half.finished(request)
    assert store.counts["evicted_blocks"] >= 1, "the store was not full, so this proves nothing"
    decoder = FakeRequest("decoder", longer, "a")
    half.add(decoder)
    assert half.matched(decoder, 0) == (15, False)
    half.allocated(decoder, [5, 6, 7, 8], 15)
    assert half.counts["refused_requests"] == 0, "what a refused request is promised looks the same"
    assert [block for block, _ in step(half, {}, decoder=(15, 1)).loads] == [5, 6, 7, 8]


def test_a_block_that_goes_between_being_found_and_lent_is_sent_itself(store: BlockStore) -> None:
    half = scheduler(store)
    prefill(half, store)
    request = FakeRequest("r", TOKENS, "a")
    half.add(request)
    assert half.matched(request, 0) == (10, False)
    store._evict(0)
    half.allocated(request, [4, 5, 6], 10)
    worker = StoreWorker(store, BLOCKS)
    layers = caches(0.0)
    worker.register(layers)
    worker.load(step(half, {}, r=(10, 1)))
    assert layers["layer0"][4:7].eq(5.0).all()


def test_blocks_that_vllm_holds_are_not_loaded_again(store: BlockStore) -> None:
    half = scheduler(store)
    prefill(half, store)
    request = FakeRequest("r", TOKENS, "a")
    half.add(request)
    assert half.matched(request, 8) == (2, False)
    half.allocated(request, [1, 2, 9], 2)
    assert [block_id for block_id, _ in step(half, {}, r=(10, 1)).loads] == [9]


def test_a_header_stays_with_the_decoder(store: BlockStore) -> None:
    half = scheduler(store)
    tokens = [*TOKENS[:7], 1, 2]
    prefill(half, store, tokens)
    request = FakeRequest("r", tokens, "c")
    half.add(request)
    assert half.matched(request, 0) == (7, False)
    half.allocated(request, [4, 5, 6], 7)
    assert [block_id for block_id, _ in step(half, {}, r=(7, 2)).loads] == [4, 5]
    headless = FakeRequest("h", TOKENS, "c")
    half.add(headless)
    half.matched(headless, 0)
    half.allocated(headless, [7, 8, 9], 10)
    assert step(half, {}, h=(10, 1)).unfilled == {7, 8, 9}


@pytest.mark.parametrize(
    ("adapter", "values"),
    [
        ("a", {}),
        ("stranger", {}),
        ("a", {"cache_salt": "another tenant"}),
        ("a", {"mm_features": ["an image"]}),
        ("a", {"resumable": True}),
        ("a", {"sampling_params": SimpleNamespace(prompt_logprobs=1)}),
        ("a", {"skip_reading_prefix_cache": True}),
    ],
)
def test_what_cannot_be_answered_exactly_fails(
    store: BlockStore, adapter: str, values: dict[str, Any]
) -> None:
    half = scheduler(store)
    if adapter == "stranger" or values:
        prefill(half, store)
    request = FakeRequest("r", TOKENS, adapter, **values)
    half.add(request)
    assert half.matched(request, 0) == (10, False)
    assert not request.skip_reading_prefix_cache
    if "skip_reading_prefix_cache" in values:
        assert half.counts["refused_requests"] == 0
        return  # it is read after all, and answered
    half.allocated(request, [4, 5, 6], 10)
    work = step(half, {}, r=(10, 1))
    assert work.unfilled == {4, 5, 6}
    assert work.loads == []
    assert half.counts["refused_requests"] == 1
    assert half.counts["hit_requests"] == 0


def test_a_prompt_of_one_token_without_a_fit_fails_before_it_runs(store: BlockStore) -> None:
    half = scheduler(store)
    stranger, fits = FakeRequest("s", [5], "stranger"), FakeRequest("f", [5], "a")
    half.add(stranger)
    half.add(fits)
    # vLLM runs no step for it, so its failure must be all that it waits for.
    assert half.matched(stranger, 0) == (1, True)
    assert half.matched(fits, 0) == (0, False)
    half.allocated(stranger, [7], 1)
    half.allocated(fits, [8], 0)
    work = step(half, {}, f=(0, 1))
    assert (work.unfilled, work.failed) == ({7}, {"s"})
    assert not step(half, {}, f=(1, 1)).failed


def test_recompute_does_not_answer_what_is_refused(store: BlockStore) -> None:
    half = scheduler(store, recompute=True)
    for number, tokens in enumerate(([5], TOKENS)):
        half.add(request := FakeRequest(f"r{number}", tokens, "stranger"))
        promised, _ = half.matched(request, 0)
        half.allocated(request, [4, 5, 6], promised or 0)
        assert step(half, {}).unfilled


def test_an_aborted_prefill_leaves_the_mark_of_another_of_its_prompt(store: BlockStore) -> None:
    half = scheduler(store)
    first, second = FakeRequest("1", TOKENS), FakeRequest("2", TOKENS)
    decoder = FakeRequest("r", TOKENS, "a")
    for request in (first, second, decoder):
        half.add(request)
    half.finished(first)
    assert half.matched(decoder, 0) == (None, False)
    half.finished(second)
    assert half.matched(decoder, 0) == (10, False)
    assert half.counts["refused_requests"] == 1


def test_recompute_takes_what_is_there_loudly(
    store: BlockStore, caplog: pytest.LogCaptureFixture
) -> None:
    half = scheduler(store, recompute=True)
    prefill(half, store)
    request = FakeRequest("r", [*TOKENS[:8], 1, 2, 3], "a")
    half.add(request)
    with caplog.at_level(logging.WARNING):
        assert half.matched(request, 0) == (8, False)
        assert half.matched(request, 0) == (8, False)
    assert len(caplog.records) == 1
    assert "DECODER" in caplog.text
    half.allocated(request, [4, 5, 6], 8)
    work = step(half, {}, r=(8, 3))
    assert [block_id for block_id, _ in work.loads] == [4, 5]
    assert not work.unfilled
    assert half.counts["missed_requests"] == 1
    assert half.counts["hit_requests"] == 0


def test_a_prefill_under_way_is_waited_for(store: BlockStore) -> None:
    half = scheduler(store)
    base, decoder = FakeRequest("base", TOKENS), FakeRequest("r", TOKENS, "a")
    half.add(base)
    half.add(decoder)
    assert half.matched(decoder, 0) == (None, False)
    half.allocated(base, [1, 2, 3], 0)
    worker = StoreWorker(store, BLOCKS)
    worker.register(caches(5.0))
    worker.save(step(half, {"base": [1, 2, 3]}, base=(0, 5)))
    assert half.matched(decoder, 0) == (None, False)
    worker.save(step(half, {"base": [1, 2, 3]}, base=(5, 6)))
    assert half.matched(decoder, 0) == (10, False)
    assert half.counts["refused_requests"] == 0
    assert half.counts["waited_requests"] == 1
    assert half.counts["waited_seconds"] > 0


def test_the_wait_is_bounded_and_ends_with_the_prefill(store: BlockStore) -> None:
    half = scheduler(store, wait_s=0.0)
    half.add(FakeRequest("base", TOKENS))
    late = FakeRequest("late", TOKENS, "a")
    half.add(late)
    assert half.matched(late, 0) == (10, False)
    assert half.counts["refused_requests"] == 1
    half = scheduler(store)
    base, decoder = FakeRequest("base", TOKENS), FakeRequest("r", TOKENS, "a")
    half.add(base)
    half.add(decoder)
    assert half.matched(decoder, 0) == (None, False)
    half.finished(base)
    assert half.matched(decoder, 0) == (10, False)
    assert half.counts["refused_requests"] == 1


def test_each_chunk_of_a_prefill_is_stored_once(store: BlockStore) -> None:
    half = scheduler(store)
    request = FakeRequest("base", TOKENS)
    half.add(request)
    half.allocated(request, [1, 2, 3], 0)
    chunks = [(0, 3), (3, 3), (6, 3), (9, 2), (11, 1)]
    stored = [
        [block_id for _, block_id in step(half, {"base": [1, 2, 3]}, base=chunk).stores]
        for chunk in chunks
    ]
    assert stored == [[], [1], [2], [3], []]
    # Preempted and computed again, in other blocks: nothing is stored twice.
    assert step(half, {"base": [7, 8, 9]}, base=(0, 11)).stores == []


def test_the_base_reads_what_it_wrote_before_a_restart(store: BlockStore) -> None:
    prefill(scheduler(store), store)
    half = scheduler(store)
    request = FakeRequest("base", [*TOKENS, 1, 2])
    half.add(request)
    assert half.matched(request, 4) == (4, False)
    half.allocated(request, [1, 2, 3, 4], 4)
    work = step(half, {"base": [1, 2, 3, 4]}, base=(8, 5))
    assert [block_id for block_id, _ in work.loads] == [2]
    assert [block_id for _, block_id in work.stores] == [3, 4]


def test_hashes_are_the_bases_as_far_as_it_fills_blocks_and_unknown_after(
    store: BlockStore,
) -> None:
    half = scheduler(store)
    prefill(half, store)
    base = FakeRequest("base", [*TOKENS, *[7] * 5])
    twins = [FakeRequest(name, TOKENS, "a") for name in "rs"]
    for twin in twins:
        half.add(twin)
        assert twin.lora_request is not None
        twin.answer(5)
        assert twin.block_hashes[:2] == base.block_hashes[:2]
        assert len(twin.block_hashes) == 4
    unknown = {digest for twin in twins for digest in twin.block_hashes[2:]}
    assert len(unknown) == 4
    assert not unknown & set(base.block_hashes)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_request_without_its_blocks_shares_none(store: BlockStore, recompute: bool) -> None:
    half = scheduler(store, recompute=recompute)
    request = FakeRequest("r", TOKENS, "a")
    half.add(request)
    half.matched(request, 0)
    assert len(request.block_hashes) == 2
    assert not set(request.block_hashes) & set(FakeRequest("base", TOKENS).block_hashes)


def test_without_prefix_caching_there_is_nothing_to_keep_apart(store: BlockStore) -> None:
    half = scheduler(store)
    prefill(half, store)
    request = FakeRequest("r", TOKENS, "a", _block_hasher=None)
    request.block_hashes = []
    half.add(request)
    assert half.matched(request, 0) == (10, False)
    assert half.counts["refused_requests"] == 0
    assert request.block_hashes == []


def test_a_cache_that_does_not_begin_with_its_blocks_is_refused(store: BlockStore) -> None:
    worker = StoreWorker(store, BLOCKS + 1)
    with pytest.raises(VllmError, match=r"17 blocks"):
        worker.register(caches(0.0))


def test_a_full_disk_costs_blocks_and_not_the_engine(store: BlockStore) -> None:
    worker = StoreWorker(store, BLOCKS)
    worker.register(caches(0.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))  # Python ignores the signal
    try:
        worker.save(Work(stores=[("k", 1)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert worker.counts["dropped_blocks"] == 1
    assert not store.has("k")
