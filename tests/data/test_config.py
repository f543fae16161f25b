"""Values that cannot be meant are refused when a recipe is read."""

from __future__ import annotations

import ast
import inspect
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from prefillshare_train.data import DataConfig, SourceConfig, config, sources

SOURCE = SourceConfig(source="rows.jsonl")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"eval_fraction": 1.0}, "eval_fraction must be in"),
        ({"eval_fraction": -0.1}, "eval_fraction must be in"),
        ({"eval_max_rows": 0}, "eval_max_rows must be 1 or more"),
        ({"max_length": 1}, "max_length must be 2 or more"),
        ({"chat_template": "a", "prompt_template": "b"}, "are both set"),
        ({"prompt_template": "b", "chat_template_kwargs": {"x": True}}, "no effect"),
    ],
)
def test_bad_data_config(values: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        DataConfig(train=SOURCE, **values)


@pytest.mark.parametrize("values", [{"sample": 0}, {"distractors": -1}])
def test_bad_source_config(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SourceConfig(source="rows.jsonl", **values)


def test_plain_values_validate_into_the_dataclasses() -> None:
    adapter = TypeAdapter(DataConfig)
    made = adapter.validate_python(
        {"train": {"source": "a.jsonl", "format": "gsm8k", "sample": 5}, "overlong": "error"}
    )
    assert made == DataConfig(
        train=SourceConfig(source="a.jsonl", format="gsm8k", sample=5), overlong="error"
    )
    for bad in ({"overlong": "cut"}, {"train_on": "some"}, {"train": {"source": "a", "format": 1}}):
        with pytest.raises(ValidationError):
            adapter.validate_python({"train": {"source": "a.jsonl"}, **bad})


def test_every_field_has_a_docstring_below_it() -> None:
    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(below, ast.Expr), ast.unparse(field)
                assert isinstance(below.value, ast.Constant), ast.unparse(field)


def test_every_format_that_can_be_named_can_be_read() -> None:
    assert set(get_args(config.FormatName)) == {"auto", "seal_tools", *sources.FORMATS}
