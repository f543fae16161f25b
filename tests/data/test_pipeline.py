"""`build_dataset`: splitting, deduplication, order, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.data import helpers
from tests.data.helpers import chat, pairs, tiny_tokenizer, write_jsonl

from prefillshare_train.core.spans import Conversation
from prefillshare_train.data import (
    DataConfig,
    DataError,
    PreparedData,
    SourceConfig,
    build_dataset,
    is_correct,
)

Build = Callable[..., PreparedData]


def prompts(data: PreparedData, conversations: list[Conversation]) -> set[str]:
    return {
        data.renderer.decode(item.token_ids[: item.turns[0].prompt_length])
        for item in conversations
    }


def test_split_is_a_share_and_leaves_nothing_out(build: Build) -> None:
    data = build(pairs(100), eval_fraction=0.2)
    assert (len(data.train), len(data.eval)) == (80, 20)
    assert not prompts(data, data.train) & prompts(data, data.eval)
    assert len({*data.train, *data.eval}) == 100


def test_same_configuration_gives_the_same_data(build: Build) -> None:
    first, again = (build(pairs(100), eval_fraction=0.2) for _ in range(2))
    assert first.train == again.train
    assert first.eval == again.eval
    other_seed = build(pairs(100), eval_fraction=0.2, seed=1)
    assert set(other_seed.eval) != set(first.eval)
    other_order = build(pairs(100), eval_fraction=0.2, shuffle_seed=1)
    assert other_order.train != first.train
    assert set(other_order.train) == set(first.train)
    assert other_order.eval == first.eval


def test_training_order_is_shuffled_and_evaluation_order_is_not(build: Build) -> None:
    data = build(pairs(50), eval_rows=pairs(50, start=100))
    lines = [int(row.origin.rsplit(":", 1)[1]) for row in data.eval_rows]
    assert lines == list(range(1, 51))
    texts = [data.renderer.decode(item.token_ids) for item in data.train]
    assert texts != sorted(texts, key=len)
    assert len(set(texts)) == 50


def test_equal_prompts_stay_on_the_same_side(build: Build) -> None:
    rows = [
        {"prompt": f"question {number // 4}", "completion": f"answer {number}"}
        for number in range(80)
    ]
    for seed in range(5):
        data = build(rows, eval_fraction=0.25, seed=seed)
        assert len(data.eval) == 20
        assert not prompts(data, data.train) & prompts(data, data.eval)


def test_groups_larger_than_the_share_still_give_an_evaluation(build: Build) -> None:
    rows = [{"prompt": f"q{n // 3}", "completion": f"a{n}"} for n in range(9)]
    data = build(rows, eval_fraction=0.1)
    assert (len(data.train), len(data.eval)) == (6, 3)
    assert build(rows, eval_fraction=0.1, eval_max_rows=2).eval == []
    assert build(rows[:3], eval_fraction=0.1).eval == []


def test_no_fraction_no_evaluation(build: Build) -> None:
    data = build(pairs(10), eval_fraction=0)
    assert (len(data.train), data.eval, data.eval_examples) == (10, [], [])
    assert data.report.eval is None


def test_split_keeps_one_row_to_train(build: Build) -> None:
    assert len(build(pairs(1), eval_fraction=0.9).train) == 1
    assert len(build(pairs(2), eval_fraction=0.9).train) == 1


def test_evaluation_has_a_largest_size(build: Build) -> None:
    split = build(pairs(100), eval_fraction=0.5, eval_max_rows=7)
    assert (len(split.train), len(split.eval)) == (93, 7)
    own = build(pairs(5), eval_rows=pairs(40, start=10), eval_max_rows=7)
    assert len(own.eval) == 7
    again = build(pairs(5), eval_rows=pairs(40, start=10), eval_max_rows=7)
    assert own.eval == again.eval
    assert len(build(pairs(5), eval_rows=pairs(40, start=10), eval_max_rows=None).eval) == 40


def test_duplicates_go_and_are_counted(build: Build) -> None:
    rows = [*pairs(10), *pairs(5)]
    data = build(rows, eval_fraction=0)
    assert len(data.train) == 10
    assert data.report.sources[0].duplicates == 5
    assert "5 duplicates removed" in str(data.report)
    whole = build(rows, eval_fraction=0, dedupe=False)
    assert len(whole.train) == 15
    assert whole.report.sources[0].duplicates == 0


def test_training_rows_that_are_evaluated_go_and_are_counted(build: Build) -> None:
    data = build(pairs(10), eval_rows=pairs(4))
    assert len(data.train) == 6
    assert data.report.eval_overlap == 4
    assert not set(data.train) & set(data.eval)
    assert "4 training rows removed that are also evaluated" in str(data.report)
    assert len(build(pairs(10), eval_rows=pairs(4), dedupe=False).train) == 10
    with pytest.raises(DataError, match="is left to train on: all 4 are also evaluated"):
        build(pairs(4), eval_rows=pairs(4))


def test_all_rows_dropped_is_an_error_that_names_the_reasons(build: Build) -> None:
    rows = [
        *({"prompt": "a" * 200, "completion": str(number)} for number in range(3)),
        {"prompt": "a", "completion": "\nb"},
    ]
    with pytest.raises(DataError) as error:
        build(rows, max_length=100)
    text = str(error.value)
    assert text.startswith("all 4 rows of ")
    assert "  3 overlong: longer than max_length" in text
    assert "  1 seam_mismatch: prompt tokens are not a prefix" in text
    assert "train.jsonl:4: the prompt's tokens" in text


def test_all_evaluation_rows_dropped_is_an_error_too(build: Build) -> None:
    with pytest.raises(DataError, match=r"all 1 rows of .*eval.jsonl were dropped"):
        build(pairs(4), eval_rows=[{"prompt": "a", "completion": "b" * 200}], max_length=100)


def test_overlong_rows_are_dropped_and_counted_or_an_error(build: Build) -> None:
    rows = [*pairs(5), {"prompt": "a", "completion": "b" * 200}]
    data = build(rows, max_length=100, eval_fraction=0)
    assert len(data.train) == 5
    assert data.report.sources[0].drops["overlong"].count == 1
    ((origin, detail),) = data.report.sources[0].drops["overlong"].examples
    assert origin.endswith("train.jsonl:6")
    assert "response of 201 tokens" in detail
    with pytest.raises(DataError, match=r"train.jsonl:6: longer than max_length 100: prompt of"):
        build(rows, max_length=100, overlong="error")


def test_overlong_later_turn_is_an_error_where_asked(build: Build) -> None:
    rows = [{"messages": chat("a", "b", "c", "d" * 200)}]
    data = build(rows, max_length=100, eval_fraction=0)
    assert data.report.sources[0].dropped_turns == 1
    assert "1 further turns dropped" in str(data.report)
    with pytest.raises(DataError, match=r"train.jsonl:1: .*1 of its turns end later"):
        build(rows, max_length=100, overlong="error")


def test_rewritten_history_is_counted(build: Build) -> None:
    rows = [
        {"messages": chat("a", "<think>x</think>b", "c", "<think>y</think>d", "e", "f")},
        {"messages": chat("g", "h", "i", "j")},
    ]
    rows.append(rows[0])
    data = build(rows, eval_fraction=0, tokenizer=tiny_tokenizer(helpers.DROPS_THINK))
    assert sorted(len(item.turns) for item in data.train) == [1, 1, 1, 2]
    source = data.report.sources[0]
    assert (source.history_rewritten, source.history_rewritten_turns) == (1, 3)
    assert source.duplicates == 1
    assert "1 rows whose template rewrites history, trained as 3 examples" in str(data.report)


def test_rows_of_one_conversation_are_not_split_over_both_sides(build: Build) -> None:
    rows = [
        {"messages": chat(f"a{n}", f"<think>x</think>b{n}", "c", "<think>y</think>d")}
        for n in range(10)
    ]
    data = build(rows, eval_fraction=0.3, tokenizer=tiny_tokenizer(helpers.DROPS_THINK))
    assert (len(data.train), len(data.eval), len(data.eval_rows)) == (14, 6, 3)
    assert len(data.eval_examples) == 6


def test_eval_examples_are_what_was_trained(build: Build) -> None:
    data = build(pairs(3), eval_rows=[{"messages": chat("a", "b", "c", "d")}])
    first, second = data.eval_examples
    assert [item.reference for item in (first, second)] == ["b", "d"]
    assert [item.message["content"] for item in (first, second)] == ["b", "d"]
    assert first.row is second.row is data.eval_rows[0]
    assert list(second.prompt_ids) == data.renderer.prompt_ids(chat("a", "b", "c"))
    assert second.header_length == data.eval[0].turns[1].header_length > 0


def test_reference_of_a_tool_call_counts_as_right(build: Build) -> None:
    call = {"name": "f", "arguments": {"word": "a<b", "n": [1, None, 2.5]}}
    rows = [
        {
            "messages": [*chat(f"a{n}"), helpers.message("assistant", "", tool_calls=[call])],
            "tools": [helpers.tool("f", "word")],
        }
        for n in range(2)
    ]
    data = build(rows, eval_fraction=0.5, chat_template="chatml-tools")
    (example,) = data.eval_examples
    assert example.row.scoring == "tool_calls"
    assert is_correct(example.reference, example.message, example.row.scoring)


def test_bad_evaluation_rows_are_found_before_any_row_is_tokenized(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefillshare_train.data.pipeline.RowTokenizer", None)
    with pytest.raises(DataError, match=r"eval.jsonl:2: key 'completion' is missing"):
        build(pairs(3), eval_rows=[*pairs(1), {"prompt": "a"}])


def test_recipe_options_reach_the_prompts(build: Build) -> None:
    data = build(pairs(3), system_prompt="be kind", eval_fraction=0)
    assert all("be kind" in text for text in prompts(data, data.train))
    last = build([{"messages": chat("a", "b", "c", "d")}], train_on="last_turn", eval_fraction=0)
    assert [len(item.turns) for item in last.train] == [1]
    sampled = build(pairs(30), source={"sample": 7}, eval_fraction=0)
    assert len(sampled.train) == 7
    assert "30 rows read, 7 sampled" in str(sampled.report)


def test_relative_source_is_looked_up_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, elsewhere = tmp_path / "recipe", tmp_path / "elsewhere"
    write_jsonl(recipe / "rows" / "a.jsonl", pairs(3))
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = DataConfig(train=SourceConfig(source="rows/a.jsonl"), eval_fraction=0)
    assert len(build_dataset(config, tiny_tokenizer(), base_dir=recipe).train) == 3


def test_report_has_sizes_and_is_json(build: Build) -> None:
    data = build(pairs(20), eval_fraction=0.25)
    report = data.report
    assert report.eval is not None
    assert (report.train.conversations, report.eval.conversations) == (15, 5)
    assert report.train.tokens == sum(len(item.token_ids) for item in data.train)
    assert report.train.response_tokens == sum(item.response_tokens for item in data.train)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["train"]["lengths"]["response"]["total"] == report.train.response_tokens
    assert "20 rows read" in str(report)
