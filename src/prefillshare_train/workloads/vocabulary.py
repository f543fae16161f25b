"""Token ids that prompts can be drawn from."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def ordinary_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of a tokenizer that are neither special nor added: nothing ends or opens a turn."""
    added = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return tuple(sorted(token for token in tokenizer.get_vocab().values() if token not in added))
