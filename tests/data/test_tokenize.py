"""Token ids and spans: seams, end tokens, lengths, turns."""

from __future__ import annotations

import pytest
from tests.data import helpers
from tests.data.helpers import chat, dropped, kept, message, renderer_with, row, tokenize

from prefillshare_train.core.spans import Turn
from prefillshare_train.data import DataError


def test_prompt_response_and_header_are_where_the_template_puts_them() -> None:
    renderer = renderer_with()
    result = kept(*tokenize(renderer, row(chat("hi", "yo"))))
    (conversation,) = result.conversations
    (turn,) = conversation.turns
    assert helpers.turn_texts(renderer, result) == [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "yo<|im_end|>")
    ]
    header = conversation.token_ids[turn.prompt_length - turn.header_length : turn.prompt_length]
    assert renderer.decode(header) == "<|im_start|>assistant\n"
    assert len(conversation.token_ids) == turn.end, "the newline after the end is never generated"
    assert result.notes == ()


def test_merge_across_the_seam_is_dropped_and_shows_both_tails() -> None:
    renderer = renderer_with()
    drop = dropped(*tokenize(renderer, row(chat("hi", "\nyo"))))
    assert drop.reason == "seam_mismatch"
    # The header's last token is "\n" in the prompt and "\n\n" where the answer follows.
    assert repr("<|im_start|>assistant\n")[1:-1] in drop.detail
    assert repr("<|im_start|>assistant\n\nyo<|im_end|>")[1:-1] in drop.detail
    prompt = renderer.prompt_ids(chat("hi"))
    assert f"part at token {len(prompt) - 1} of {len(prompt)}" in drop.detail


def test_generation_prompt_that_the_answer_lacks_is_a_seam_mismatch() -> None:
    drop = dropped(*tokenize(renderer_with(helpers.OPENS_THINK), row(chat("hi", "yo"))))
    assert drop.reason == "seam_mismatch"
    assert "<think>" in drop.detail


def test_end_token_that_is_also_the_pad_token_is_trained() -> None:
    renderer = renderer_with()
    tokenizer = renderer.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (conversation,) = kept(*tokenize(renderer, row(chat("hi", "yo")))).conversations
    (turn,) = conversation.turns
    assert conversation.token_ids[turn.end - 1] == tokenizer.eos_token_id
    assert conversation.response_tokens == len("yo") + 1


def test_one_bos_stays_one() -> None:
    renderer = renderer_with(helpers.WITH_BOS, bos="<s>", adds_bos=True)
    (conversation,) = kept(*tokenize(renderer, row(chat("hi", "yo")))).conversations
    assert conversation.token_ids.count(renderer.tokenizer.bos_token_id) == 1
    assert conversation.token_ids[0] == renderer.tokenizer.bos_token_id


def test_two_bos_are_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:1: prompts start with two BOS .*<s><s>"):
        tokenize(renderer_with(helpers.TWICE_BOS, bos="<s>"), row(chat("hi", "yo")))


def test_only_what_an_end_token_closes_is_trained() -> None:
    """Phi-3's template writes EOS after the last turn, which is never generated."""
    renderer = renderer_with(helpers.PHI, eos="<|endoftext|>")
    result = kept(*tokenize(renderer, row(chat("hi", "yo"))))
    assert helpers.turn_texts(renderer, result)[0][1] == "yo<|im_end|>"
    assert result.notes == ()


def test_template_without_end_token_is_noted() -> None:
    renderer = renderer_with(helpers.NO_END)
    result = kept(*tokenize(renderer, row(chat("hi", "yo"))))
    assert result.notes == ("no_end_token",)
    assert helpers.turn_texts(renderer, result) == [("user: hi\nassistant: ", "yo\n")]


def test_end_token_inside_a_response_is_noted() -> None:
    result = kept(*tokenize(renderer_with(), row(chat("hi", "y<|im_end|>o"))))
    assert result.notes == ("end_token_inside_response",)


def test_header_that_merges_with_the_prompt_is_measured_from_the_bare_prompt() -> None:
    """The header alone is `:` and a newline; after `A` its colon is in another token."""
    template = (
        "{%- for message in messages -%}{{- message.content -}}"
        "{{- eos_token if message.role == 'assistant' -}}{%- endfor -%}"
        "{{- ':\n' if add_generation_prompt -}}"
    )
    template = template.replace(
        "{{- message.content -}}",
        "{{- (':\n' if message.role == 'assistant' else '') + message.content -}}",
    )
    renderer = renderer_with(template)
    turns = [
        kept(*tokenize(renderer, row(chat(prompt, "yo")))).conversations[0].turns[0]
        for prompt in ("B", "A")
    ]
    assert turns[0] == Turn(prompt_length=3, end=6, header_length=2)
    assert turns[1] == Turn(prompt_length=2, end=5, header_length=0)


def test_answer_that_the_template_renders_as_nothing_is_dropped() -> None:
    renderer = renderer_with(helpers.NEVER_THINKS)
    drop = dropped(*tokenize(renderer, row(chat("hi", "<think>hm</think>"))))
    assert drop.reason == "empty_response"


def test_overlong_turn_is_dropped_with_its_lengths_and_never_cut() -> None:
    renderer = renderer_with()
    fits, too_long = row(chat("hi", "yo")), row(chat("hi", "y" * 30), origin="rows.jsonl:2")
    (conversation,) = kept(*tokenize(renderer, fits)).conversations
    limit = len(conversation.token_ids)
    results = tokenize(renderer, fits, too_long, max_length=limit)
    assert kept(results[0]).conversations == (conversation,)
    drop = dropped(results[1])
    prompt = conversation.turns[0].prompt_length
    assert drop.reason == "overlong"
    assert f"prompt of {prompt} and response of 31 tokens exceed max_length {limit}" in drop.detail
    assert "'yyy" in drop.detail
    assert dropped(*tokenize(renderer, fits, max_length=limit - 1)).reason == "overlong"


def test_later_turns_past_the_limit_leave_the_earlier_ones() -> None:
    renderer = renderer_with()
    whole = kept(*tokenize(renderer, row(chat("a", "b", "c", "d"))))
    first = whole.conversations[0].turns[0]
    cut = kept(*tokenize(renderer, row(chat("a", "b", "c", "d")), max_length=first.end))
    assert cut.conversations[0].turns == (first,)
    assert cut.conversations[0].token_ids == whole.conversations[0].token_ids[: first.end]
    assert cut.dropped_turns == 1
    assert [target["content"] for target in cut.targets] == ["b"]


def test_consistent_conversation_is_one_with_many_turns() -> None:
    renderer = renderer_with()
    messages = chat("a", "b", "c", "d", "e", "f")
    result = kept(*tokenize(renderer, row(messages)))
    (conversation,) = result.conversations
    assert not result.rewrites_history
    assert len(conversation.turns) == 3
    for index, turn in zip((1, 3, 5), conversation.turns, strict=True):
        served = renderer.prompt_ids(messages[:index])
        assert list(conversation.token_ids[: turn.prompt_length]) == served
    assert [answer for _, answer in helpers.turn_texts(renderer, result)] == [
        "b<|im_end|>",
        "d<|im_end|>",
        "f<|im_end|>",
    ]


def test_template_that_rewrites_history_gives_one_conversation_a_turn() -> None:
    renderer = renderer_with(helpers.DROPS_THINK)
    messages = chat("a", "<think>x</think>\nb", "c", "<think>y</think>\nd")
    result = kept(*tokenize(renderer, row(messages)))
    assert result.rewrites_history
    assert [len(item.turns) for item in result.conversations] == [1, 1]
    (first_prompt, first), (second_prompt, second) = helpers.turn_texts(renderer, result)
    assert first == "<think>x</think>\nb<|im_end|>"
    assert second == "<think>y</think>\nd<|im_end|>"
    assert "x" not in second_prompt
    assert "\nb<|im_end|>" in second_prompt
    assert second_prompt == renderer.decode(renderer.prompt_ids(messages[:3]))
    assert first_prompt == renderer.decode(renderer.prompt_ids(messages[:1]))


def test_same_template_without_reasoning_stays_one_conversation() -> None:
    result = kept(*tokenize(renderer_with(helpers.DROPS_THINK), row(chat("a", "b", "c", "d"))))
    assert not result.rewrites_history
    assert len(result.conversations) == 1


def test_reasoning_of_an_untrained_turn_rewrites_nothing_that_is_trained() -> None:
    messages = chat("a", "<think>x</think>b", "c", "d", "e", "f")
    messages[1]["weight"] = 0
    result = kept(*tokenize(renderer_with(helpers.DROPS_THINK), row(messages)))
    assert not result.rewrites_history
    assert len(result.conversations[0].turns) == 2


def test_weight_zero_is_context_only() -> None:
    renderer = renderer_with()
    messages = chat("a", "b", "c", "d")
    messages[1]["weight"] = 0
    result = kept(*tokenize(renderer, row(messages)))
    ((prompt, answer),) = helpers.turn_texts(renderer, result)
    assert "\nb<|im_end|>" in prompt
    assert answer == "d<|im_end|>"


def test_last_turn_is_that_with_a_weight() -> None:
    renderer = renderer_with()
    messages = chat("a", "b", "c", "d", "e", "f")
    messages[5]["weight"] = 0
    last = kept(*tokenize(renderer, row(chat("a", "b", "c", "d")), train_on="last_turn"))
    assert [text for _, text in helpers.turn_texts(renderer, last)] == ["d<|im_end|>"]
    weighted = kept(*tokenize(renderer, row(messages), train_on="last_turn"))
    assert [text for _, text in helpers.turn_texts(renderer, weighted)] == ["d<|im_end|>"]


def test_no_trained_turn_and_no_prompt_are_drops() -> None:
    silent = chat("a", "b")
    silent[1]["weight"] = 0
    first = [message("assistant", "welcome"), *chat("a", "b")]
    no_turn, no_answer, no_prompt = map(
        dropped, tokenize(renderer_with(), row(silent), row(chat("a")), row(first))
    )
    assert no_turn.reason == no_answer.reason == "no_trained_turn"
    assert no_prompt.reason == "no_prompt"
    assert "'welcome'" in no_prompt.detail


def test_system_prompt_gives_a_first_assistant_message_its_prompt() -> None:
    renderer = renderer_with(system_prompt="be kind")
    result = kept(*tokenize(renderer, row([message("assistant", "welcome")])))
    assert helpers.turn_texts(renderer, result)[0] == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>assistant\n",
        "welcome<|im_end|>",
    )


def test_refusing_template_is_a_drop_with_its_reason() -> None:
    template = "{{- raise_exception('roles must alternate') if messages|length > 2 -}}"
    results = tokenize(
        renderer_with(template + helpers.CHATML), row(chat("a", "b")), row(chat("a", "b", "c", "d"))
    )
    assert kept(results[0]).conversations
    drop = dropped(results[1])
    assert drop.reason == "template_error"
    assert "roles must alternate" in drop.detail


def test_results_do_not_depend_on_what_is_tokenized_with_them() -> None:
    renderer = renderer_with()
    rows = [row(chat(f"{n} " * n, "yo")) for n in range(1, 300)]
    together = tokenize(renderer, *rows)
    assert together[270] == tokenize(renderer, rows[270])[0]
    assert [kept(item).row for item in together] == rows
