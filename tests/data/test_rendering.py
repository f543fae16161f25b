"""Templates, prompt ids, end tokens and the fingerprint of all that shapes a prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.data import helpers
from tests.data.helpers import chat, kept, message, renderer_with, row, tiny_tokenizer, tokenize
from transformers import PreTrainedTokenizerBase

from prefillshare_train.data import DataError, Renderer, make_renderer
from prefillshare_train.data.rendering import (
    RenderError,
    packaged_templates,
    tokenizer_fingerprint,
)


def prompt_renderer(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Renderer:
    return make_renderer(tokenizer or tiny_tokenizer(None), prompt_template=name)


def served(renderer: Renderer, *contents: str) -> list[tuple[str, str]]:
    return helpers.turn_texts(renderer, kept(*tokenize(renderer, row(chat(*contents)))))


@pytest.mark.parametrize("adds_bos", [False, True])
def test_ids_are_those_of_apply_chat_template(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(helpers.WITH_BOS, bos="<s>", adds_bos=adds_bos)
    messages = chat("hi", "yo", "then")
    ids = make_renderer(tokenizer).ids(messages, add_generation_prompt=True)
    assert ids == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    returned: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == returned["input_ids"], "the default returns a dict"


def test_ids_ignore_padding_and_truncation_set_by_earlier_calls() -> None:
    tokenizer = tiny_tokenizer()
    renderer = make_renderer(tokenizer)
    expected = renderer.encode(["a", "long text"])
    tokenizer(["a", "bb"], padding="max_length", max_length=2, truncation=True)
    assert renderer.encode(["a", "long text"]) == expected
    assert renderer.encode([]) == []


def test_decode_keeps_spaces_and_special_tokens_unless_told() -> None:
    renderer = renderer_with()
    (ids,) = renderer.encode(["a , b .<|im_end|>"])
    assert renderer.decode(ids) == "a , b .<|im_end|>"
    assert renderer.decode(ids, skip_special_tokens=True) == "a , b ."


def test_refusal_of_a_template_is_a_render_error_with_its_reason() -> None:
    with pytest.raises(RenderError, match=r"template default refuses .*no system role"):
        renderer_with("{{- raise_exception('no system role') -}}").text(
            chat("a"), add_generation_prompt=True
        )
    with pytest.raises(RenderError, match="refuses the messages"):
        renderer_with().text([], add_generation_prompt=True)


def test_system_prompt_fills_in_only_where_there_is_none() -> None:
    renderer = renderer_with(system_prompt="be kind")
    assert "be kind" in renderer.decode(renderer.prompt_ids(chat("hi")))
    for role in ("system", "developer"):
        given = [message(role, "be brief"), *chat("hi")]
        assert "be kind" not in renderer.decode(renderer.prompt_ids(given))
    assert renderer_with().with_system_prompt(chat("hi")) == chat("hi")


def test_template_file_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(helpers.NO_END)
    renderer = make_renderer(tiny_tokenizer(), chat_template="own.jinja", base_dir=tmp_path)
    assert (renderer.kind, renderer.name) == ("chat_template", "own.jinja")
    assert renderer.text(chat("hi"), add_generation_prompt=True) == "user: hi\nassistant: "


def test_unknown_template_lists_the_packaged_ones() -> None:
    with pytest.raises(DataError, match=r"chat_template: nope is neither .* chatml-tools"):
        make_renderer(tiny_tokenizer(), chat_template="nope")
    with pytest.raises(DataError, match=r"prompt_template: nope .*alpaca, plain, question_answer"):
        make_renderer(tiny_tokenizer(), prompt_template="nope")


def test_no_template_at_all_says_what_to_set() -> None:
    with pytest.raises(DataError, match=r"no chat template. Set data.prompt_template to one of al"):
        make_renderer(tiny_tokenizer(None))


def test_template_that_is_no_jinja_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=r"not valid Jinja \(line 2: ") as error:
        renderer_with("a\n{% for %}")
    assert not isinstance(error.value, RenderError)


def test_tokenizer_with_several_templates_uses_that_for_tools() -> None:
    with_tools = "{{- tools[0].function.name -}}" + helpers.CHATML
    renderer = renderer_with({"default": helpers.CHATML, "tool_use": with_tools})
    tools = [helpers.tool("lookup")]
    assert renderer.text(chat("hi"), tools, add_generation_prompt=False).startswith("lookup<|im")
    assert renderer.text(chat("hi"), add_generation_prompt=False).startswith("<|im_start|>")


def test_template_arguments_reach_the_template() -> None:
    template = helpers.CHATML + "{{- '<think></think>' if quiet -}}"
    renderer = renderer_with(template, template_kwargs={"quiet": True})
    assert renderer.text(chat("hi"), add_generation_prompt=True).endswith("<think></think>")


def test_end_tokens_are_eos_those_given_and_the_closing_one() -> None:
    tokenizer = tiny_tokenizer(helpers.PHI, eos="<|endoftext|>")
    names = tokenizer.convert_ids_to_tokens(list(make_renderer(tokenizer).end_token_ids))
    assert names == ["<|endoftext|>", "<|im_end|>"]
    given: Any = tokenizer.convert_tokens_to_ids("<s>")
    assert given in make_renderer(tokenizer, end_token_ids=[given]).end_token_ids
    plain = tiny_tokenizer(helpers.NO_END)
    assert make_renderer(plain).end_token_ids == (plain.eos_token_id,)


def test_alpaca() -> None:
    first, second = served(prompt_renderer("alpaca"), "add", "2", "more", "3")
    assert first == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nadd\n\n### Response:\n",
        "2<|im_end|>",
    )
    assert second[0].endswith("2<|im_end|>\n\n### Instruction:\nmore\n\n### Response:\n")
    renderer = prompt_renderer("alpaca")
    text = renderer.text([message("system", "be kind"), *chat("hi")], add_generation_prompt=False)
    assert text == "be kind\n\n### Instruction:\nhi"


def test_question_answer_and_plain() -> None:
    assert served(prompt_renderer("question_answer"), "one?", "1", "two?", "2") == [
        ("Question: one?\nAnswer:", " 1<|im_end|>"),
        ("Question: one?\nAnswer: 1<|im_end|>\n\nQuestion: two?\nAnswer:", " 2<|im_end|>"),
    ]
    assert served(prompt_renderer("plain"), "def f():", " pass") == [
        ("def f():", " pass<|im_end|>")
    ]


@pytest.mark.parametrize("name", packaged_templates("prompt"))
def test_prompt_templates_begin_with_bos_where_the_tokenizer_does(name: str) -> None:
    for adds_bos in (True, False):
        tokenizer = tiny_tokenizer(None, bos="<s>", adds_bos=adds_bos)
        renderer = prompt_renderer(name, tokenizer)
        ids = renderer.prompt_ids(chat("hi"))
        assert ids.count(tokenizer.bos_token_id) == int(adds_bos)
        assert (ids[0] == tokenizer.bos_token_id) == adds_bos
        tokenizer.chat_template = renderer.template
        assert ids == tokenizer.apply_chat_template(
            chat("hi"), add_generation_prompt=True, return_dict=False
        ), "the template alone, given to whatever serves, makes the same prompt"


def test_own_prompt_template_that_writes_bos_gets_no_second(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{- bos_token + messages[0].content -}}")
    renderer = prompt_renderer(str(path), tiny_tokenizer(None, bos="<s>", adds_bos=True))
    assert renderer.decode(renderer.prompt_ids(chat("hi"))) == "<s>hi"


def test_own_prompt_template_without_end_gets_eos(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{%- for m in messages -%}{{- m.content -}}{%- endfor -%}")
    renderer = prompt_renderer(str(path))
    result = kept(*tokenize(renderer, row(chat("hi", "yo"))))
    assert helpers.turn_texts(renderer, result) == [("hi", "yo<|im_end|>")]
    assert result.notes == ("eos_appended",)


def test_prompt_template_needs_eos() -> None:
    tokenizer = tiny_tokenizer(None, pad=None)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token to end a response"):
        prompt_renderer("plain", tokenizer)


@pytest.mark.parametrize("name", packaged_templates("prompt"))
def test_prompt_templates_refuse_tool_calls(name: str) -> None:
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [message("user", "hi"), message("assistant", "", tool_calls=[call])]
    with pytest.raises(RenderError, match=f"{name} has no tool calls"):
        prompt_renderer(name).text(messages, add_generation_prompt=False)


def test_fingerprint_is_json_and_tells_what_shapes_a_prompt(tmp_path: Path) -> None:
    base = renderer_with().fingerprint()
    assert json.loads(json.dumps(base)) == base
    assert renderer_with().fingerprint() == base
    (tmp_path / "same.jinja").write_text(helpers.CHATML)
    copied = make_renderer(
        tiny_tokenizer(), chat_template="same.jinja", base_dir=tmp_path
    ).fingerprint()
    assert {key for key in base if base[key] != copied[key]} == {"kind", "name"}
    changed = {
        "template_sha256": renderer_with(helpers.CHATML + " "),
        "system_prompt": renderer_with(system_prompt="be kind"),
        "template_kwargs": renderer_with(template_kwargs={"quiet": True}),
        "end_token_ids": renderer_with(end_token_ids=[0]),
        "tokenizer_sha256": renderer_with(bos="<s>"),
    }
    for key, renderer in changed.items():
        other = renderer.fingerprint()
        assert {name for name in base if base[name] != other[name]} == {key}


def test_tokenizer_fingerprint_is_of_contents_and_not_of_use(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bb"], padding="max_length", max_length=2, truncation=True)
    tokenizer.pad_token = "<s>"
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    loaded = type(tokenizer).from_pretrained(tmp_path / "two")
    assert tokenizer_fingerprint(loaded) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_prompts_are_told_from_those_of_chats(adds_bos: bool) -> None:
    tokenizer = tiny_tokenizer(None, bos="<s>", adds_bos=adds_bos)
    assert prompt_renderer("plain", tokenizer).is_plain
    for name in ("alpaca", "question_answer"):
        assert not prompt_renderer(name, tokenizer).is_plain
    assert not renderer_with().is_plain
    assert not renderer_with("{{- raise_exception('never') -}}").is_plain
