"""From a request to a sequence: refuse what can never be served, before it waits for anything."""

from __future__ import annotations

from prefillshare_train.serving.api import EventSink, GenerationRequest, ServingError
from prefillshare_train.serving.config import EngineConfig
from prefillshare_train.serving.detokenizer import Detokenizer
from prefillshare_train.serving.kv_storage import KVStorage
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.serving.prefix_cache import root_key
from prefillshare_train.serving.sampling import TokenPicker
from prefillshare_train.serving.sequence import Sequence


class Intake:
    """Checks requests against the models and the pool.

    Args:
        storage: all blocks, divided evenly among the prefill workers.
    """

    def __init__(self, models: ServedModels, config: EngineConfig, storage: KVStorage) -> None:
        self._models = models
        self._config = config
        self._storage = storage
        self._pool_blocks = storage.blocks // config.workers

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prompt that can ever be served with one response token."""
        held = (self._pool_blocks - 1) * self._storage.block_tokens
        limit = self._models.max_positions
        return held if limit is None else min(held, limit)

    def sequence(self, request: GenerationRequest, sink: EventSink) -> Sequence:
        """Check a request and give it what it will need.

        Raises:
            ServingError: it can never be served; the message says why and what to change.
        """
        models = self._models
        decoder = models.decoders.get(request.decoder)
        if decoder is None:
            raise ServingError(
                f"there is no decoder {request.decoder!r}; served are: {', '.join(models.decoders)}"
            )
        count = len(request.prompt_ids)
        if not count:
            raise ServingError("the prompt is empty")
        vocabulary = models.base.config.vocab_size
        if wrong := [i for i in request.prompt_ids if not 0 <= i < vocabulary]:
            raise ServingError(f"token id {wrong[0]} is not in the vocabulary of {vocabulary}")
        try:
            base_tokens = decoder.rule.base_length(count, request.header_length)
        except ValueError as error:
            raise ServingError(f"decoder {request.decoder}: {error}") from error
        if base_tokens < 0:
            raise ServingError(
                f"header_length {request.header_length} is more than the prompt's {count} tokens"
            )
        isolated = self._config.mode == "isolated"
        seq = Sequence(
            request,
            decoder,
            base_tokens,
            root_key(
                models.base_fingerprint,
                str(self._storage.geometry.dtype),
                request.cache_salt,
                request.decoder if isolated else None,
            ),
            sink,
            TokenPicker(request.sampling, self._storage.device),
            Detokenizer(models.renderer.tokenizer, request.sampling.stop, request.prompt_ids),
            request.decoder if isolated else "",
        )
        self._check_size(seq)
        return seq

    def _check_size(self, seq: Sequence) -> None:
        count, response = len(seq.request.prompt_ids), seq.request.sampling.max_tokens
        what = f"a prompt of {count} tokens and a response of {response}"
        limit = self._models.max_positions
        longest = count + response - 1
        if limit is not None and longest > limit:
            raise ServingError(
                f"{what} take {longest} positions; the model has {limit}. Shorten one of them"
            )
        size = self._storage.block_tokens
        needed = -(-seq.base_tokens // size) - (-seq.own_capacity // size)
        if needed > self._pool_blocks:
            raise ServingError(
                f"{what} take {needed} blocks; a prefill worker's pool has {self._pool_blocks}. "
                "Shorten one of them, or raise kv_bytes"
            )
