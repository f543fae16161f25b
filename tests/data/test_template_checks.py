"""Templates that leave out tools or calls are a fault of the recipe, found on the first row."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data import helpers
from tests.data.helpers import chat, kept, message, renderer_with, row, tokenize, tool

from prefillshare_train.data import DataError, Renderer, make_renderer
from prefillshare_train.data.report import SourceReport

TOOLS = [tool("lookup", "word"), tool("sum", "left", "right")]
CALL = {"name": "lookup", "arguments": {"word": "a"}}
OTHER = {"name": "sum", "arguments": {"left": "1", "right": "2"}}
SHOWS_TOOLS = "{%- for tool in tools or [] -%}{{- tool.function.name + '\n' -}}{%- endfor -%}"


def calling(*calls: dict[str, Any]) -> list[dict[str, Any]]:
    return [message("user", "hi"), message("assistant", "", tool_calls=list(calls))]


def packaged() -> Renderer:
    return make_renderer(helpers.tiny_tokenizer(None), chat_template="chatml-tools")


def test_template_that_ignores_tools_is_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row has tools, .*chatml-tools"):
        tokenize(renderer_with(), row(chat("hi", "yo"), TOOLS))


def test_template_that_shows_some_tools_only_is_refused_also_on_a_later_row() -> None:
    first_only = SHOWS_TOOLS.replace("tools or []", "(tools or [])[:1]") + helpers.CHATML
    rows = [row(chat("hi", "yo"), TOOLS[:1]), row(chat("hi", "yo"), TOOLS, "rows.jsonl:2")]
    with pytest.raises(DataError, match=r"rows.jsonl:2: .* leaves out 1 of the row's 2 tools: sum"):
        tokenize(renderer_with(first_only), *rows)


def test_template_that_ignores_calls_is_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row has tool calls, but"):
        tokenize(renderer_with(SHOWS_TOOLS + helpers.CHATML), row(calling(CALL), TOOLS))


def test_calls_of_turns_that_are_not_trained_are_checked_too() -> None:
    messages = calling(CALL)
    messages[1]["weight"] = 0
    messages += [message("tool", "found"), message("assistant", "done")]
    with pytest.raises(DataError, match="the row has tool calls, but"):
        tokenize(renderer_with(SHOWS_TOOLS + helpers.CHATML), row(messages, TOOLS))


def test_template_that_shows_one_call_only_is_refused() -> None:
    one_call = SHOWS_TOOLS + helpers.CHATML.replace(
        "message.content",
        "message.content + (message.tool_calls[0].function.name if message.tool_calls else '')",
    )
    with pytest.raises(DataError, match="leaves out the call of sum; it renders the turn as"):
        tokenize(renderer_with(one_call), row(calling(CALL, OTHER), TOOLS))


def test_packaged_template_shows_tools_calls_and_results() -> None:
    renderer = packaged()
    messages = [
        *calling(CALL, OTHER),
        message("tool", "first result"),
        message("tool", "second result"),
        message("assistant", "done"),
    ]
    result = kept(*tokenize(renderer, row(messages, TOOLS)))
    assert len(result.conversations) == 1
    (prompt, calls), (later, answer) = helpers.turn_texts(renderer, result)
    assert prompt.startswith("<|im_start|>system\n# Tools\n")
    assert '<tools>\n{"type": "function", "function": {"name": "lookup"' in prompt
    assert calls == (
        '<tool_call>\n{"name": "lookup", "arguments": {"word": "a"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "sum", "arguments": {"left": "1", "right": "2"}}\n</tool_call>'
        "<|im_end|>"
    )
    assert later.endswith(
        "<|im_start|>user\n<tool_response>\nfirst result\n</tool_response>\n<tool_response>\n"
        "second result\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert answer == "done<|im_end|>"


def test_packaged_template_puts_the_system_prompt_before_the_tools() -> None:
    messages = [message("system", "be brief"), *calling(CALL)]
    renderer = packaged()
    prompt = helpers.turn_texts(renderer, kept(*tokenize(renderer, row(messages, TOOLS))))[0][0]
    assert prompt.startswith("<|im_start|>system\nbe brief\n\n# Tools\n")
    assert prompt.count("<|im_start|>system") == 1


def test_names_outside_ascii_are_recognised() -> None:
    tools = [tool("größe", "wort")]
    call = {"name": "größe", "arguments": {"wort": "ü"}}
    renderer = packaged()
    result = kept(*tokenize(renderer, row(calling(call), tools)))
    assert '"größe"' in helpers.turn_texts(renderer, result)[0][1]


SHOWS_REASONING = helpers.CHATML.replace(
    "message.content",
    "('<think>' + message.reasoning_content.strip() + '</think>' "
    "if message.reasoning_content else '') + message.content",
)


def test_reasoning_that_the_template_leaves_out_is_counted_once_a_turn() -> None:
    def notes(renderer: Renderer, *more: dict[str, Any]) -> tuple[str, ...]:
        messages = [
            item
            for extra in more
            for item in (message("user", "hi"), message("assistant", "yo", **extra))
        ]
        return kept(*tokenize(renderer, row(messages))).notes

    left_out = "reasoning_left_out"
    for key in ("reasoning_content", "thinking", "reasoning"):
        assert notes(renderer_with(), {key: "hm"}) == (left_out,)
        assert notes(renderer_with(), {key: "hm"}, {}, {key: "oh"}) == (left_out, left_out)
        assert notes(renderer_with(), {key: " "}, {key: None}) == ()
    assert notes(renderer_with(SHOWS_REASONING), {"reasoning_content": "hm\n"}) == ()
    assert notes(renderer_with(), {"thinking": "hm", "weight": 0}, {}) == ()
    assert notes(renderer_with(), {"thinking": "hm", "reasoning": "hm"}) == (left_out,)


def test_reasoning_left_out_is_in_the_report() -> None:
    (result,) = tokenize(
        renderer_with(), row([*chat("a"), message("assistant", "b", thinking="c")])
    )
    report = SourceReport("x", "messages", 1, 0, 1)
    report.add(result)
    assert report.lines()[1:] == [
        "  1 turns whose reasoning the template leaves out: it is not trained"
    ]
