"""A decoder's folder holds all that its prompts need."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.data import helpers
from tests.data.helpers import tiny_tokenizer

from prefillshare_train.data import (
    DataError,
    Renderer,
    base_renderer,
    make_renderer,
    saved_renderer,
)

MESSAGES = [{"role": "user", "content": "Hi there"}]
OPTIONS = [
    {},
    {"chat_template": "chatml-tools", "system_prompt": "Be brief."},
    {"prompt_template": "alpaca"},
    {"chat_template": "chatml-tools", "template_kwargs": {"enable_thinking": False}},
]


def save(folder: Path, options: dict[str, object]) -> Renderer:
    renderer = make_renderer(tiny_tokenizer(), end_token_ids=[5], **options)  # type: ignore[arg-type]
    renderer.saved_tokenizer().save_pretrained(folder)
    return renderer


@pytest.mark.parametrize("options", OPTIONS)
def test_it_renders_what_was_trained(tmp_path: Path, options: dict[str, object]) -> None:
    trained = save(tmp_path, options)
    loaded = saved_renderer(tmp_path, trained.prompt_contract())
    assert loaded.prompt_ids(MESSAGES) == trained.prompt_ids(MESSAGES)
    assert loaded.end_token_ids == trained.end_token_ids
    assert loaded.prompt_contract() == trained.prompt_contract()


@pytest.mark.parametrize("names", [("default",), ("default", "tool_use")])
def test_named_templates_come_back(tmp_path: Path, names: tuple[str, ...]) -> None:
    templates = {name: helpers.CHATML + f"{{# {name} #}}" for name in names}
    trained = make_renderer(tiny_tokenizer(templates))
    trained.saved_tokenizer().save_pretrained(tmp_path)
    loaded = saved_renderer(tmp_path, trained.prompt_contract())
    assert loaded.template == (templates if len(names) > 1 else templates["default"])


def test_another_template_or_tokenizer_is_refused(tmp_path: Path) -> None:
    trained = save(tmp_path, {"chat_template": "chatml-tools"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="template_sha256"):
        saved_renderer(tmp_path, trained.prompt_contract())
    trained.saved_tokenizer().save_pretrained(tmp_path)
    prompt = {**trained.prompt_contract(), "tokenizer_sha256": "0" * 64}
    with pytest.raises(DataError, match="tokenizer_sha256"):
        saved_renderer(tmp_path, prompt)


def test_the_tokenizer_in_use_is_not_changed() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.chat_template
    make_renderer(tokenizer, prompt_template="alpaca").saved_tokenizer()
    assert tokenizer.chat_template == before


def test_a_base_without_a_chat_template_takes_the_prompt_template(tmp_path: Path) -> None:
    for name, own in (("chat", helpers.CHATML), ("text", None)):
        tiny_tokenizer(own).save_pretrained(tmp_path / name)
    chat, text = (str(tmp_path / name) for name in ("chat", "text"))
    assert base_renderer(chat, None, None, prompt_template="plain").kind == "tokenizer"
    assert base_renderer(text, None, "chatml-tools", prompt_template="plain").name == "chatml-tools"
    assert base_renderer(text, None, None, prompt_template="plain").is_plain
    with pytest.raises(DataError, match="no chat template"):
        base_renderer(text, None, None)
