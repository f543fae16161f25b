"""A tiny byte-level tokenizer, chat templates with known faults, and rows to try them on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefillshare_train.data import Renderer, Row, make_renderer
from prefillshare_train.data.rows import Record, make_row
from prefillshare_train.data.tokenize import Drop, RowTokenizer, TokenizedRow

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
# "\n\n" is one token, so that a response which begins with a newline merges with a header that
# ends in one; the others only shorten what is common.
MERGES = (("Ċ", "Ċ"), ("Ġ", "a"), ("t", "h"), ("th", "e"), ("A", ":"))

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\n' if add_generation_prompt -}}"
)
# Reasoning is kept in the last message only, as Qwen3 does.
DROPS_THINK = (
    "{%- for message in messages -%}"
    "{%- set content = message.content -%}"
    "{%- if message.role == 'assistant' and not loop.last and '</think>' in content -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{{- '<|im_start|>assistant\n' if add_generation_prompt -}}"
)
# Reasoning is dropped from every message, the one that is trained too.
NEVER_THINKS = DROPS_THINK.replace("and not loop.last ", "")
# The generation prompt opens a block that the finished message does not have.
OPENS_THINK = CHATML.replace("assistant\n' if", "assistant\n<think>\n' if")
WITH_BOS = "{{- bos_token -}}" + CHATML
TWICE_BOS = "{{- bos_token + bos_token -}}" + CHATML
NO_END = (
    "{%- for message in messages -%}"
    "{{- message.role + ': ' + message.content + '\n' -}}"
    "{%- endfor -%}"
    "{{- 'assistant: ' if add_generation_prompt -}}"
)
# Both after Phi-3: the end-of-turn token is not the EOS, which follows the last turn only.
PHI = CHATML + "{{- eos_token if not add_generation_prompt -}}"


def tiny_tokenizer(
    chat_template: Any = CHATML,
    *,
    eos: str = "<|im_end|>",
    pad: str | None = "<|im_end|>",
    bos: str | None = None,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose every byte is a token; EOS is also the pad token."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [left + right for left, right in MERGES]
    vocab = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=pad, bos_token=bos
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(*contents: str) -> list[dict[str, Any]]:
    """Messages of user and assistant by turns, the user first."""
    return [
        message("assistant" if index % 2 else "user", content)
        for index, content in enumerate(contents)
    ]


def row(messages: Sequence[dict[str, Any]], tools: Any = None, origin: str = "rows.jsonl:1") -> Row:
    return make_row(Record({}, origin, 0), list(messages), tools)


def record(values: dict[str, Any], index: int = 0) -> Record:
    return Record(values, f"rows.jsonl:{index + 1}", index)


def tool(name: str, *parameters: str) -> dict[str, Any]:
    properties = {key: {"type": "string"} for key in parameters}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": f"does {name}",
            "parameters": {"type": "object", "properties": properties},
        },
    }


def renderer_with(chat_template: Any = CHATML, **options: Any) -> Renderer:
    """A renderer on a tiny tokenizer that has this chat template."""
    keys = ("system_prompt", "template_kwargs", "end_token_ids")
    own = {key: options.pop(key) for key in keys if key in options}
    return make_renderer(tiny_tokenizer(chat_template, **options), **own)


def tokenize(
    renderer: Renderer, *rows: Row, max_length: int = 4096, **options: Any
) -> list[TokenizedRow | Drop]:
    return list(RowTokenizer(renderer, max_length=max_length, **options).tokenize(rows))


def kept(result: TokenizedRow | Drop) -> TokenizedRow:
    assert isinstance(result, TokenizedRow), result
    return result


def dropped(result: TokenizedRow | Drop) -> Drop:
    assert isinstance(result, Drop), result
    return result


def turn_texts(renderer: Renderer, result: TokenizedRow) -> list[tuple[str, str]]:
    """Prompt and response of every turn, decoded."""
    return [
        (
            renderer.decode(conversation.token_ids[: turn.prompt_length]),
            renderer.decode(conversation.token_ids[turn.prompt_length : turn.end]),
        )
        for conversation in result.conversations
        for turn in conversation.turns
    ]


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    text = "".join(json.dumps(item) + "\n" for item in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def pairs(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows of prompt and completion, all different."""
    return [
        {"prompt": f"question {number}?", "completion": f"answer {number}"}
        for number in range(start, start + count)
    ]
