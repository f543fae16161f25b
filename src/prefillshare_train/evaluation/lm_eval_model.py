"""A decoder over its base as a model of lm-eval, registered as `prefillshare`.

    --model prefillshare --model_args decoder=DIR[,base=PATH][,prefill=base|self][,dtype=float32]

lm-eval finds a model class only once it is imported; `prefillshare lm-eval` does so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    postprocess_generated_text,
    resolve_max_length,
)
from tqdm.auto import tqdm

from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import LoadedDecoder, load_decoder
from prefillshare_train.core.modules import causal_lm_of, empty_cache
from prefillshare_train.core.prompt_cache import PromptCache
from prefillshare_train.data import Renderer, saved_renderer
from prefillshare_train.evaluation.lm_eval_decoding import Decoding
from prefillshare_train.evaluation.lm_eval_prompts import DecoderPrompts
from prefillshare_train.evaluation.lm_eval_scoring import Continuation, score_continuations
from prefillshare_train.evaluation.task import EvaluationError

_logger = logging.getLogger(__name__)
_BATCHES_A_PREFILL = 4


@register_model("prefillshare")
class PrefillShareLM(TemplateLM):
    """The base prefills each prompt up to the contract's boundary; the decoder does the rest."""

    def __init__(
        self,
        decoder: str | None = None,
        base: str | None = None,
        prefill: Literal["base", "self"] | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        *,
        loaded: LoadedDecoder | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        """Load a decoder's folder, or take one that is loaded.

        Args:
            decoder: the decoder's folder.
            base: hub id or path of the base, where it is not what the contract names.
            prefill: `base` shares the base's cache; `self` has the decoder run whole prompts, as
                an ordinary model does. Where None, what the decoder was trained for.
            batch_size: prompts answered, or continuations scored, at once.
            max_batch_size: what lm-eval passes for `auto` batch sizes; not read.
            device: such as `cuda:1`; the first GPU where None. The CPU where there is no GPU, since
                lm-eval's command line asks for `cuda:0` unasked.
            dtype: of base and decoder, such as `float32`; see `load_decoder`.
            max_length: positions of prompt and answer together; the model's own where None. Longer
                prompts are cut on the left, as by lm-eval's HFLM.
            loaded: a loaded decoder, instead of a folder.
            renderer: the prompts of `loaded`; from the folder `decoder` where None.

        Raises:
            EvaluationError: an argument is missing or is not one of its values.
            ContractError: the base is not the one that the contract names.
            DataError: the folder's tokenizer is not the one that the contract names.
        """
        super().__init__()
        if prefill not in ("base", "self", None):
            raise EvaluationError(f"prefill={prefill}: give base or self")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise EvaluationError(f"batch_size={batch_size}: give a number of 1 or more")
        if loaded is None:
            if decoder is None:
                raise EvaluationError(
                    "name the decoder's folder: --model_args decoder=DIR (or pass loaded=)"
                )
            loaded = load_decoder(
                decoder,
                base=base,
                dtype=_dtype(dtype),
                device=_device(device),
            )
        if renderer is None:
            if decoder is None:
                raise EvaluationError("loaded= has no prompts: pass renderer= or decoder= too")
            renderer = saved_renderer(decoder, loaded.contract.prompt)
        self.loaded = loaded
        self.prompts = DecoderPrompts(renderer, loaded.contract.rule)
        self.tokenizer = self.prompts.tokenizer
        self.batch_size = int(batch_size)
        trained = "self" if loaded.contract.method == "full_prompt" else "base"
        self._shares = (prefill or trained) == "base"
        self._model = causal_lm_of(loaded.decoder)
        self._device = self._model.device
        self.max_length = max_length or resolve_max_length(self._model.config, self.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """Context of a continuation that has none: BOS, or EOS where there is no BOS."""
        return self.prompts.prefix_token_id

    @property
    def max_gen_toks(self) -> int:
        """The longest answer where a task gives none; HFLM's."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        """Names all that shapes a prompt, since lm-eval keeps rendered prompts under this name."""
        return self.prompts.name

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        contract = self.loaded.contract
        return {
            "prefill": "base" if self._shares else "self",
            "boundary": contract.boundary,
            "method": contract.method,
            "adapter": contract.adapter,
            "base": contract.base_id,
            "base_fingerprint": contract.base_fingerprint,
            "prompt": contract.prompt,
            "model_dtype": str(self._model.dtype),
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """See `DecoderPrompts.chat`."""
        return self.prompts.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """See `DecoderPrompts.encode`."""
        return self.prompts.encode(string, add_special_tokens)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refused.

        Raises:
            EvaluationError: always.
        """
        raise EvaluationError(
            "loglikelihood_rolling scores a text that has no prompt, so that there is no cache to "
            "share; use lm-eval's own hf model for perplexity"
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = [self._continuation(*request) for request in requests]
        # Choices of one question side by side, so that one prefill serves them.
        order = sorted(
            range(len(rows)),
            key=lambda i: (-rows[i].prompt_length, rows[i].ids[: rows[i].prompt_length]),
        )
        scores: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(rows), disable=disable_tqdm, desc="Running loglikelihood requests")
        with bar:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                found = score_continuations(
                    self.loaded.decoder,
                    self.loaded.prefill if self._shares else None,
                    [rows[i] for i in chosen],
                )
                for index, score in zip(chosen, found, strict=True):
                    scores[index] = score
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
                bar.update(len(chosen))
        return [scores[index] for index in range(len(rows))]

    def _continuation(
        self, texts: tuple[str, str], context: list[int], continuation: list[int]
    ) -> Continuation:
        room = self.max_length + 1 - len(continuation)
        if not continuation or room < 1:
            raise EvaluationError(
                f"a continuation has {len(continuation)} tokens; it must have 1 to "
                f"{self.max_length}: {texts[1][:80]!r}"
            )
        kept = self._cut(context, room)
        base = self._base_length(texts[0], context, len(kept))
        return Continuation((*kept, *continuation), len(kept), base)

    def _cut(self, ids: list[int], room: int) -> list[int]:
        if len(ids) > room:
            _logger.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
        return ids[-room:]

    def _base_length(self, text: str, ids: list[int], kept: int) -> int:
        return self.prompts.base_length(text, ids, kept) if self._shares else 0

    def _cache(self, beginnings: list[list[int]]) -> PromptCache:
        if not self._shares:
            return empty_cache((0,) * len(beginnings), self._model)
        return self.loaded.prefill.prefill(beginnings)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """One answer a request, cut at its first stop string.

        Sampling draws from the distribution that the options leave, seeded by torch's seed (lm-eval
        sets it from `--seed`). HFLM adds the model's generation config (often top_k 50) unasked.

        Raises:
            EvaluationError: an option that cannot be honoured, or no room for a prompt.
        """
        answers: dict[int, str] = {}
        eos = str(self.tokenizer.decode(self.eot_token_id))
        grouped: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            grouped.setdefault(key, []).append(index)
        bar = tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
        )
        with bar:
            for indices in grouped.values():
                decoding = Decoding.of(requests[indices[0]].args[1], eos, self.max_gen_toks)
                texts = [requests[index].args[0] for index in indices]
                for place, answer in self._answers(texts, decoding):
                    index = indices[place]
                    answers[index] = answer
                    self.cache_hook.add_partial("generate_until", requests[index].args, answer)
                    bar.update()
        return [answers[index] for index in range(len(requests))]

    def _answers(self, texts: Sequence[str], decoding: Decoding) -> Iterator[tuple[int, str]]:
        room = self.max_length - decoding.max_new_tokens
        if room < 1:
            raise EvaluationError(
                f"max_gen_toks {decoding.max_new_tokens} leaves no room for a prompt in the "
                f"model's {self.max_length} positions; lower it"
            )
        prompts, cuts = [], []
        for text in texts:
            ids = self.tok_encode(text)
            prompts.append(self._cut(ids, room))
            cuts.append(self._base_length(text, ids, len(prompts[-1])))
        order = sorted(range(len(texts)), key=lambda i: (-len(prompts[i]), texts[i]))
        # Warpers see all rows at one response length, so that no row may wait for another.
        lump = self.batch_size * (1 if decoding.warpers else _BATCHES_A_PREFILL)
        sampler = None
        if decoding.sampled:
            sampler = torch.Generator(self._device).manual_seed(torch.initial_seed())
        window = max(len(stop.encode()) for stop in decoding.stop) + 2

        def should_stop(_: int, ids: Sequence[int]) -> bool:
            tail = self.prompts.renderer.decode(ids[-window:])
            return any(stop in tail for stop in decoding.stop)

        for start in range(0, len(order), lump):
            chosen = order[start : start + lump]
            responses = generate(
                self.loaded.decoder,
                self._cache([prompts[i][: cuts[i]] for i in chosen]),
                [prompts[i] for i in chosen],
                max_new_tokens=decoding.max_new_tokens,
                stop_ids=self.prompts.renderer.end_token_ids,
                processors=decoding.warpers or None,
                sampler=sampler,
                should_stop=should_stop,
                batch_size=self.batch_size,
            )
            for index, ids in zip(chosen, responses, strict=True):
                yield index, self._text(ids, decoding.stop)

    def _text(self, ids: list[int], stop: list[str]) -> str:
        if ids[-1] in self.prompts.renderer.end_token_ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        cut: str = postprocess_generated_text(text, stop=stop, think_end_token=None)
        return cut


def _device(asked: str | None) -> str:
    device = asked or "cuda:0"
    if device.startswith("cuda") and not torch.cuda.is_available():
        _logger.warning("there is no %s here: running on the CPU", device)
        return "cpu"
    return device


def _dtype(asked: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if asked is not None and not isinstance(found, torch.dtype):
        raise EvaluationError(f"dtype={asked}: give float32, bfloat16 or float16")
    return found
