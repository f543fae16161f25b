"""GSM8K and GSM+ by lm-eval's own filters, on rows of our own."""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from tests.data.helpers import write_jsonl

from prefillshare_train.evaluation.lm_eval_tasks import LmEvalTask, task_folder
from prefillshare_train.evaluation.task import EvaluationError, Verdict

GOLD = ("18", "-3", "1,250", "4.5")
PLUS_GOLD = ("7", "None", "1/4")
BUILT_IN = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the form of both data sets."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(
        folder / "gsm8k" / "test.jsonl",
        [
            {
                "question": f"What is {gold}?",
                "answer": f"It is <<{gold}={gold}>>{gold}.\n#### {gold}",
            }
            for gold in GOLD
        ],
    )
    write_jsonl(
        folder / "gsm_plus" / "gsmplus_testmini.jsonl",
        [
            {
                "question": f"What is {gold}?",
                "solution": f"Think.\n#### {gold}",
                "answer": gold,
                "perturbation_type": "distraction insertion",
                "seed_question": "not read",
            }
            for gold in PLUS_GOLD
        ],
    )
    return folder


@pytest.fixture(scope="module")
def gsm8k(data_dir: Path) -> LmEvalTask:
    return LmEvalTask.from_file("gsm8k", data_dir)


@pytest.fixture(scope="module")
def gsm_plus(data_dir: Path) -> LmEvalTask:
    return LmEvalTask.from_file("gsm_plus", data_dir)


def judge(task: LmEvalTask, index: int, *outputs: str) -> list[Verdict]:
    item = task.items()[index]
    calls: list[int] = []
    verdicts = task.judge([item] * len(outputs), outputs, lambda *_: calls.append(1))
    assert len(calls) == len(outputs)
    return verdicts


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("18", "She makes 9 * 2 = 18 dollars.\n#### 18"),
        ("18", "18"),
        ("18", "The answer is $18."),
        ("18", "so she earns $18 every day"),
        ("18", "18 dollars"),
        ("18", "about 18% of them"),
        ("18", "**18**"),
        ("18", "#### 4\n#### 18"),
        ("-3", "It falls to -3 degrees."),
        ("-3", "#### -3"),
        ("1,250", "1250"),
        ("1,250", "1,250 apples"),
        ("1,250", "#### $1,250."),
        ("4.5", "4.5 hours"),
    ],
)
def test_right_answers(gsm8k: LmEvalTask, gold: str, output: str) -> None:
    (verdict,) = judge(gsm8k, GOLD.index(gold), output)
    assert verdict.correct
    assert verdict.detail == ""


@pytest.mark.parametrize(
    ("gold", "output", "extracted"),
    [
        ("18", "", "[invalid]"),
        ("18", "eighteen", "[invalid]"),
        ("18", "-18", "-18"),
        ("18", "#### 18\n#### 4", "4"),
        ("-3", "3 degrees below zero", "3"),
        # What the harness gets wrong, and we with it: the last number of the text counts, whatever
        # it belongs to, and it is compared as text.
        ("18", "She earns 18 dollars in 7 days.", "7"),
        ("18", "18.00", "18.00"),
        ("18", "36/2", "2"),
        ("18", "18...", "18..."),
        ("18", "It is 18, and so on ...", "..."),
        ("-3", "\N{MINUS SIGN}3", "3"),
        ("-3", "- 3", "3"),
        ("1,250", "1 250", "250"),
        ("4.5", "4 1/2", "2"),
        ("4.5", "4,5", "4,5"),
    ],
)
def test_wrong_answers(gsm8k: LmEvalTask, gold: str, output: str, extracted: str) -> None:
    (verdict,) = judge(gsm8k, GOLD.index(gold), output)
    assert verdict == Verdict(False, extracted, f"expected {gold}, found {extracted}")


def test_verdicts_come_in_the_order_of_the_items(gsm8k: LmEvalTask) -> None:
    items = gsm8k.items()
    verdicts = gsm8k.judge(items[::-1], ["4.5", "0", "-3", "18"], lambda *_: None)
    assert [v.correct for v in verdicts] == [True, False, True, True]


def test_items_are_zero_shot_questions(gsm8k: LmEvalTask) -> None:
    items = gsm8k.items()
    assert [item.item_id for item in items] == [f"gsm8k/{n}" for n in range(len(GOLD))]
    assert items[0].messages == ({"role": "user", "content": "Question: What is 18?\nAnswer:"},)
    assert items[0].stop == ("Question:", "</s>", "<|im_end|>")
    assert items[0].max_new_tokens == 512
    assert gsm8k.items() == items


def test_answers_that_the_harness_cannot_find_are_told(
    gsm8k: LmEvalTask, gsm_plus: LmEvalTask
) -> None:
    assert [v.correct for v in judge(gsm_plus, 0, "7", "8")] == [True, False]
    for output in ("None", "#### None", "There is no answer.", "0"):
        assert not judge(gsm_plus, 1, output)[0].correct
    assert not judge(gsm_plus, 2, "1/4")[0].correct
    (note,) = [note for note in gsm_plus.notes if "can never be right" in note]
    assert note.startswith("2 of 3 items")
    assert "1 have no answer ('None'), 1 have another" in note
    assert not [note for note in gsm8k.notes if "can never be right" in note]


def test_settings_say_what_was_asked_and_how_it_is_scored(
    gsm8k: LmEvalTask, data_dir: Path
) -> None:
    file = data_dir / "gsm8k" / "test.jsonl"
    expected = {
        "harness": "lm-eval",
        "data_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "shots": 0,
        "max_new_tokens": 512,
        "score_filter": "flexible-extract",
        "stop": ["Question:", "</s>", "<|im_end|>"],
    }
    assert {key: gsm8k.settings[key] for key in expected} == expected
    assert re.fullmatch(r"\d+\.\d+.*", gsm8k.settings["harness_version"])
    shorter = LmEvalTask.from_file("gsm8k", data_dir, max_new_tokens=7)
    assert shorter.settings["max_new_tokens"] == shorter.items()[0].max_new_tokens == 7


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("gsm8k_local", "gsm8k/gsm8k"),
        ("gsm_plus_local", "gsm_plus/gsm_plus_mini"),
    ],
)
def test_task_files_are_those_of_the_harness(ours: str, theirs: str) -> None:
    here = load_yaml(task_folder() / f"{ours}.yaml")
    there = load_yaml(BUILT_IN / f"{theirs}.yaml")
    for key in ("doc_to_text", "doc_to_target", "output_type", "repeats"):
        assert here[key] == there[key], key
    for key in ("filter_list", "metric_list"):
        assert here[key] == there[key], key
    assert here["generation_kwargs"].pop("max_gen_toks") == 512
    assert here["generation_kwargs"] == there["generation_kwargs"]
    assert here["metadata"]["version"] == there["metadata"]["version"]
    assert here["metadata"]["fewshot"]["shots"] == there["num_fewshot"]
    same_split = there["fewshot_split"] == there["test_split"]
    assert here["metadata"]["fewshot"]["split"] == ("test" if same_split else "train")


@pytest.mark.parametrize("name", ["gsm8k", "gsm_plus"])
def test_plain_text_is_what_lm_eval_asks_by_default(tmp_path: Path, name: str) -> None:
    def row(number: int) -> dict[str, str]:
        answer = f"It is.\n#### {number}"
        more = {"solution": answer, "perturbation_type": "none"}
        return {"question": f"What is {number}?", "answer": answer, **more}

    config = load_yaml(task_folder() / f"{name}_local.yaml")
    fewshot = config["metadata"]["fewshot"]
    write_jsonl(tmp_path / config["metadata"]["data_file"], [row(n) for n in range(8)])
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", [row(n) for n in range(50, 60)])
    task = LmEvalTask.from_file(name, tmp_path, completion=True)
    asked = [item.messages[0]["content"] for item in task.items()]
    assert asked == [item.messages[0]["content"] for item in task.items()], "drawn anew"

    config["metadata"] |= {"data_dir": str(tmp_path), "train_file": fewshot.get("file")}
    config |= {"num_fewshot": 5, "fewshot_split": fewshot["split"]}
    theirs = ConfigurableTask(config=config)
    seed = inspect.signature(lm_eval.simple_evaluate).parameters["fewshot_random_seed"].default
    theirs.set_fewshot_seed(seed)
    theirs.build_all_requests()
    assert asked == [request.args[0] for request in theirs.instances]
    assert [text.count("Answer: It is.") for text in asked] == [5] * 8
    assert all(len(item.messages) == 1 for item in task.items())
    assert task.settings["shots"] == 5
    file = "gsm8k/train.jsonl" if name == "gsm8k" else config["metadata"]["data_file"]
    assert task.settings["examples"] == {
        "file": file,
        "seed": 1234,
        "sha256": hashlib.sha256((tmp_path / file).read_bytes()).hexdigest(),
    }
    assert "Plain text" in task.notes[0]


def test_plain_text_needs_the_file_of_examples(data_dir: Path) -> None:
    with pytest.raises(EvaluationError, match=r"gsm8k/train\.jsonl is not there"):
        LmEvalTask.from_file("gsm8k", data_dir, completion=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"test\.jsonl is not there"),
        ("", "has no rows"),
        ('{"question": "a", "answer": "#### 1"}\nnot json\n', r"test\.jsonl:2: not JSON"),
        ('["a"]\n', r"test\.jsonl:1: expected an object, found list"),
        ('{"question": "a", "answer": 3}\n', r"test\.jsonl:1: 'answer' must be text, found 3"),
        ('{"prompt": "a"}\n', r"'question' must be text, found None; the columns are 'prompt'"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, rows: str | None, message: str) -> None:
    if rows is not None:
        (tmp_path / "gsm8k").mkdir()
        (tmp_path / "gsm8k" / "test.jsonl").write_text(rows)
    with pytest.raises(EvaluationError, match=message):
        LmEvalTask.from_file("gsm8k", tmp_path)


def test_an_unknown_task_is_refused(data_dir: Path) -> None:
    with pytest.raises(EvaluationError, match="there are gsm8k, gsm_plus"):
        LmEvalTask.from_file("gsm9k", data_dir)


@pytest.mark.parametrize(
    ("name", "count", "unreachable"), [("gsm8k", 1319, 0), ("gsm_plus", 2400, 307)]
)
def test_real_data(shared_data: Path, name: str, count: int, unreachable: int) -> None:
    task = LmEvalTask.from_file(name, shared_data)
    items = task.items()
    assert len({item.item_id for item in items}) == count
    column = "answer" if name == "gsm8k" else "solution"
    answers = [item.reference["doc"][column] for item in items]
    verdicts = task.judge(items, answers, lambda *_: None)
    assert sum(not v.correct for v in verdicts) == unreachable
    wrong = task.judge(items, [answer + "1" for answer in answers], lambda *_: None)
    assert not any(v.correct for v in wrong)
