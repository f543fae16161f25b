"""lm-eval's generation options, as `core.generate` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefillshare_train.evaluation.task import EvaluationError

_WARPERS: dict[str, Any] = {
    "temperature": lambda value: TemperatureLogitsWarper(float(value)),
    "top_k": lambda value: TopKLogitsWarper(int(value)),
    "top_p": lambda value: TopPLogitsWarper(float(value)),
    "min_p": lambda value: MinPLogitsWarper(float(value)),
}


@dataclass(frozen=True)
class Decoding:
    """What a request's `gen_kwargs` ask for.

    Attributes:
        stop: strings that end an answer, the EOS text among them.
        max_new_tokens: the longest answer.
        sampled: draw from the distribution; greedy where False.
        warpers: what changes the distribution first.
    """

    stop: list[str]
    max_new_tokens: int
    sampled: bool
    warpers: LogitsProcessorList

    @classmethod
    def of(cls, gen_kwargs: dict[str, Any], eos: str, default_length: int) -> Decoding:
        """Read them as lm-eval's own models do.

        Args:
            eos: text of the EOS token.
            default_length: `max_new_tokens` where they give none.

        Raises:
            EvaluationError: an option is none of those that can be honoured.
        """
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, default_length))
        stop = [text for text in handle_stop_sequences(options.pop("until"), eos=eos) if text]
        length = options.pop("max_gen_toks")
        sampled = options.pop("do_sample")
        if unknown := sorted(options.keys() - _WARPERS.keys()):
            raise EvaluationError(
                f"generation options that prefillshare cannot honour: {', '.join(unknown)}. It "
                f"knows until, max_gen_toks, do_sample, {', '.join(_WARPERS)}"
            )
        if not sampled:
            return cls(stop, length, False, LogitsProcessorList())
        if options.get("temperature") == 0:
            raise EvaluationError(
                "do_sample=True with temperature 0 asks for sampling and for greedy decoding: set "
                "a temperature above 0, or do_sample=False"
            )
        asked = [make(options[name]) for name, make in _WARPERS.items() if name in options]
        return cls(stop, length, True, LogitsProcessorList(asked))
