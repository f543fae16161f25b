"""What a run leaves on disk: kept while it judges, gone on with, and told where it is damaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.data.helpers import tool
from tests.evaluation.sandboxes import sandbox_or_skip
from tests.evaluation.vowels import LIMITS, Vowels
from tests.training import tiny

from prefillshare_train.evaluation import answering
from prefillshare_train.evaluation.code_task import limits_of
from prefillshare_train.evaluation.contestants import Contestants, DecoderSpec
from prefillshare_train.evaluation.humaneval import HumanEvalTask
from prefillshare_train.evaluation.records import RunFolder
from prefillshare_train.evaluation.run import Limits, evaluate
from prefillshare_train.evaluation.task import EvalItem, EvaluationError, Judged, Task, Verdict
from prefillshare_train.evaluation.variants import variants_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("records") / "base")


def run(base: Path, task: Task, out: Path, limits: Limits = LIMITS, **options: Any) -> Path:
    loaded = Contestants(str(base), [DecoderSpec.parse("base")], **options)
    return evaluate(loaded, variants_of(loaded.decoders, None, []), [task], out, limits)


class Backwards(Vowels):
    """The last item is judged first, and the run is killed after so many."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def judge(
        self, items: Sequence[EvalItem], outputs: Sequence[str], judged: Judged
    ) -> list[Verdict]:
        def told(item: EvalItem, verdict: Verdict) -> None:
            if len(self.judged) == self.most:
                raise KeyboardInterrupt
            judged(item, verdict)

        return super().judge(items[::-1], outputs[::-1], told)[::-1]


def test_a_run_killed_while_it_judges_judges_nothing_twice(base: Path, tmp_path: Path) -> None:
    killed, resumed = Backwards(3), Backwards(99)
    with pytest.raises(KeyboardInterrupt):
        run(base, killed, tmp_path)
    path = tmp_path / "items" / "vowels" / "base--self.jsonl"
    with path.open("a") as file:
        file.write('{"variant": "base--se')  # what a kill in the middle of a write leaves
    summary = json.loads(run(base, resumed, tmp_path).read_text())
    assert killed.judged == ["v/6", "v/5", "v/4"]
    assert resumed.judged == ["v/3", "v/2", "v/1", "v/0"]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["item_id"] for record in records] == [f"v/{n}" for n in range(7)]
    assert summary["results"][0]["correct"] == sum(record["correct"] for record in records)


def test_verdicts_are_put_in_order_also_where_the_kill_came_after_the_last(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_verdicts", dies)
        with pytest.raises(KeyboardInterrupt):
            run(base, Backwards(99), tmp_path)
    run(base, Backwards(0), tmp_path)
    found = RunFolder(tmp_path).verdicts("vowels", "base--self")
    assert list(found) == [f"v/{n}" for n in range(7)]


def test_verdicts_beyond_a_lower_limit_stay_behind_the_others(base: Path, tmp_path: Path) -> None:
    run(base, Vowels(), tmp_path)
    few = Limits(items=2, batch_size=3, prefill_tokens=60)
    summary = json.loads(run(base, Vowels(), tmp_path, few).read_text())
    assert summary["results"][0]["n"] == 2
    found = RunFolder(tmp_path).verdicts("vowels", "base--self")
    assert list(found) == [f"v/{n}" for n in range(7)]


def test_a_run_goes_on_in_another_sandbox(base: Path, tmp_path: Path) -> None:
    few = Limits(items=2, batch_size=3, prefill_tokens=60)
    run(base, Vowels(sandbox={"user": "root"}, workers=1), tmp_path, few)
    again = Vowels(sandbox={"user": "somebody"}, workers=2)
    run(base, again, tmp_path)
    assert len(again.judged) == 5
    with pytest.raises(EvaluationError, match="version is 1 there, 2 now"):
        run(base, Vowels(version=2), tmp_path)


def test_elapsed_seconds_are_summed_over_starts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(base, Backwards(3), tmp_path)
    path = tmp_path / "elapsed.json"
    assert json.loads(path.read_text())["seconds"] > 0, "a killed start counts too"
    path.write_text('{"seconds": 1000}')
    monkeypatch.setattr(answering, "generate", None)
    summary = json.loads(run(base, Backwards(99), tmp_path).read_text())
    assert 1000 < summary["elapsed_seconds"] < 1100
    assert summary["wall_seconds"] < 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("oops", "not JSON"),
        ("", "not JSON"),
        ("[1]", "found list, expected an object"),
        ('{"item_id": "v/1"}', "missing, found item_id"),
    ],
)
@pytest.mark.parametrize("name", ["outputs/vowels.jsonl", "items/vowels/base--self.jsonl"])
def test_a_damaged_line_is_told_by_its_number(
    base: Path, tmp_path: Path, name: str, line: str, message: str
) -> None:
    run(base, Vowels(2), tmp_path)
    path = tmp_path / name
    path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(EvaluationError, match=message) as error:
        run(base, Vowels(2), tmp_path)
    assert str(error.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("name", ["run.json", "summary.json", "elapsed.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_is_told_by_its_name(
    base: Path, tmp_path: Path, name: str, text: str
) -> None:
    run(base, Vowels(2), tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match="Restore it") as error:
        run(base, Vowels(2), tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: ")


def test_rows_of_a_summary_without_what_is_needed_are_told(base: Path, tmp_path: Path) -> None:
    path = run(base, Vowels(2), tmp_path)
    path.write_text('{"results": [{"task": "vowels"}]}')
    with pytest.raises(EvaluationError, match=r"results\[0\]: variant, decode_seconds missing"):
        run(base, Vowels(2), tmp_path)


def test_half_of_a_surrogate_pair_in_an_error_is_kept_as_an_escape(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = sandbox_or_skip(limits_of(3))
    problem = {
        "task_id": "MadeUp/0",
        "entry_point": "f",
        "prompt": 'def f():\n    """Nothing."""\n',
        "test": "def check(candidate):\n    candidate()\n",
    }
    data = tmp_path / "problems.jsonl"
    data.write_text(json.dumps(problem) + "\n")
    task = HumanEvalTask(data, sandbox=sandbox, max_new_tokens=4)
    # A tiny model does not write programs.
    said = 'def f():\n    raise ValueError("\\ud800")\n'
    monkeypatch.setattr(answering, "cut_at", lambda *_: said)
    roomy = tiny.save_base(tmp_path / "base")
    config = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    run(roomy, task, tmp_path / "out")
    found = RunFolder(tmp_path / "out").verdicts("humaneval", "base--self")["MadeUp/0"]
    assert not found["correct"]
    assert found["detail"] == "failed: \\ud800"


class WithTools(Vowels):
    """Every prompt offers two functions."""

    def items(self) -> list[EvalItem]:
        tools = (tool("lookup", "word"), tool("größe", "wort"))
        message = {"role": "user", "content": "a"}
        return [EvalItem("t/0", (message,), tools=tools, max_new_tokens=1)]


def test_a_template_that_leaves_out_tools_is_refused(base: Path, tmp_path: Path) -> None:
    message = r"the item t/0 has tools, .* ignores them.*--bfcl-style prompting.*chatml-tools"
    with pytest.raises(EvaluationError, match=message):
        run(base, WithTools(), tmp_path / "out")
    template = tmp_path / "first.jinja"
    template.write_text(
        "{{- (tools or [{'function': {'name': ''}}])[0].function.name -}}"
        "{%- for message in messages -%}{{- message.content -}}{%- endfor -%}"
    )
    with pytest.raises(EvaluationError, match="leaves out 1 of the item t/0's 2 tools: größe"):
        run(base, WithTools(), tmp_path / "out", chat_template=str(template))
    config = json.loads((base / "config.json").read_text())
    roomy = tiny.save_base(tmp_path / "roomy")
    (roomy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    run(roomy, WithTools(), tmp_path / "out", chat_template="chatml-tools")
