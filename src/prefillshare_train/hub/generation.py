"""`transformers.GenerationConfig` to what `core.generate` takes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefillshare_train.hub.errors import HubError

_DEFAULT_NEW_TOKENS = 20  # those of transformers
_DEFAULT_TOP_K = 50
_TAKEN = frozenset(
    "max_new_tokens max_length min_new_tokens do_sample temperature top_k top_p min_p "
    "repetition_penalty no_repeat_ngram_size num_return_sequences eos_token_id pad_token_id".split()
)
# They change nothing about the tokens, or only say where the configuration came from.
_IDLE = frozenset("bos_token_id use_cache transformers_version _from_model_config".split())
# At these values an option that is not offered asks for nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "typical_p": 1.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer one batch.

    Attributes:
        max_new_tokens: the longest response; None where only `max_length` was given.
        max_length: prompt (padding included) and response together, as transformers counts.
        stop_ids: token ids that end a response.
        pad_id: fills the rows of shorter responses.
        sampling: draw from the distribution; greedy otherwise.
        returns: responses to each prompt.
        config: the composed configuration.
        custom: the caller's own logits processors.
    """

    max_new_tokens: int | None
    max_length: int | None
    stop_ids: tuple[int, ...]
    pad_id: int
    sampling: bool
    returns: int
    config: GenerationConfig
    custom: LogitsProcessorList = field(default_factory=LogitsProcessorList)

    def new_tokens(self, width: int) -> int:
        """Longest response to prompts of `width` tokens, padding included.

        Raises:
            HubError: `max_length` leaves no room for a response.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return _DEFAULT_NEW_TOKENS
        if self.max_length <= width:
            raise HubError(
                f"max_length is {self.max_length} and the prompt has {width} tokens already: "
                "set max_new_tokens instead"
            )
        return self.max_length - width

    @property
    def reads_history(self) -> bool:
        """Whether scores depend on earlier tokens, so that padding must not be among them."""
        penalty = self.config.repetition_penalty
        return bool(
            self.custom
            or (penalty is not None and penalty != 1.0)
            or self.config.no_repeat_ngram_size
        )

    def processors(self, width: int, device: Any) -> LogitsProcessorList:
        """Logits processors in the order of transformers' own `generate`.

        Args:
            width: tokens of the longest prompt.
        """
        config = self.config
        made = LogitsProcessorList()
        if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
            made.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if config.no_repeat_ngram_size:
            made.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        if config.min_new_tokens and self.stop_ids:
            made.append(
                MinNewTokensLengthLogitsProcessor(
                    width, config.min_new_tokens, list(self.stop_ids), device=device
                )
            )
        made.extend(self.custom)
        if not self.sampling:
            return made
        if config.temperature is not None and config.temperature != 1.0:
            made.append(TemperatureLogitsWarper(config.temperature))
        top_k = _DEFAULT_TOP_K if config.top_k is None else config.top_k
        if top_k:
            made.append(TopKLogitsWarper(top_k))
        if config.top_p is not None and config.top_p < 1.0:
            made.append(TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            made.append(MinPLogitsWarper(config.min_p))
        return made


def generation_settings(
    own: GenerationConfig,
    given: GenerationConfig | None,
    options: dict[str, Any],
    *,
    trained_ends: Sequence[int],
    logits_processor: LogitsProcessorList | None = None,
) -> GenerationSettings:
    """Compose the model's configuration, the caller's and single options.

    Args:
        own: the model's configuration, for what the caller leaves open.
        given: the caller's, in its place.
        options: single values, before both.
        trained_ends: token ids that end a response in the decoder's contract; they hold where
            neither the caller's configuration nor an option names others.

    Raises:
        HubError: an option is unknown, or one that is not offered.
    """
    config = copy.deepcopy(given if given is not None else own)
    if "max_new_tokens" in options and "max_length" not in options:
        config.max_length = None  # the model's own must not cut short what was asked for
    unknown = config.update(**options)
    if unknown:
        raise HubError(
            f"generate() takes no {', '.join(sorted(unknown))}. It takes input_ids, "
            f"attention_mask, streamer, logits_processor, generation_config, "
            f"{', '.join(sorted(_TAKEN))}"
        )
    asked = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key not in _TAKEN | _IDLE and value not in (None, False) and value != _NEUTRAL.get(key)
    }
    if asked:
        named = ", ".join(f"{key}={value!r}" for key, value in sorted(asked.items()))
        raise HubError(f"generate() over a shared cache does not offer {named}: leave it out")
    named_ends = options.get("eos_token_id", given.eos_token_id if given is not None else None)
    ends = _ids(named_ends) or tuple(trained_ends) or _ids(config.eos_token_id)
    pad = config.pad_token_id
    return GenerationSettings(
        max_new_tokens=config.max_new_tokens,
        max_length=config.max_length,
        stop_ids=ends,
        pad_id=_ids(pad)[0] if pad is not None else (ends[0] if ends else 0),
        sampling=bool(config.do_sample),
        returns=config.num_return_sequences or 1,
        config=config,
        custom=logits_processor or LogitsProcessorList(),
    )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)
