"""A tokenizer whose words begin with a space that a text's first word loses, as Llama 2's."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

SPECIAL = "<|assistant|>"
_WORDS = ("a", "▁The", "▁is", "▁Paris", "Paris", "▁", ".", "\ufffd")


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """A few words, every byte as a token, and the decoder of Llama 2, Mistral and Phi-3."""
    names = ["<unk>", "<s>", "</s>", SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *_WORDS]
    vocab = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(name, special=True) for name in names[:4]])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def ids_of(*tokens: str) -> list[int]:
    """Ids of tokens by name."""
    found: list[int] = _ONCE.convert_tokens_to_ids(list(tokens))
    return found


_ONCE = llama_tokenizer()
