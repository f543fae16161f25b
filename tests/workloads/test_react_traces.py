"""Reading ReAct trajectories, from rows that these tests write themselves."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from prefillshare_train.workloads.errors import WorkloadError
from prefillshare_train.workloads.lengths import BUILT_IN
from prefillshare_train.workloads.react_traces import Step, read_trajectories
from prefillshare_train.workloads.run import choose_lengths

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = (
    "Thought: I look it up.\nAction: search[blue]\nObservation: Blue is\na colour.\n"
    "Thought: Done.\nAction: finish[colour]\nObservation: Episode finished, reward = True\n"
)
LOG = """\
########################################
BEGIN TRIAL 1
Trial summary: Correct: 1, Incorrect: 1, Halted: 0
#######################################
------------- BEGIN CORRECT AGENTS -------------

Question: What is blue?
Thought 1: I look
it up.
Action 1: Search[blue]
Observation 1: Blue is a colour.
Thought 2: Done.
Action 2: Finish[colour]
Observation 2: Answer is CORRECT
Correct answer: colour

------------- BEGIN HALTED AGENTS --------------

Question: What is red?
Thought 1: Hm.
Action 1: Search[red]
Observation 1: Nothing.
Correct answer: colour
"""


def test_rows_become_steps_without_the_last_observation(tmp_path: Path) -> None:
    rows = [{"instruction": "What is blue? ", "input": "", "output": OUTPUT}]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    [found] = read_trajectories(tmp_path)
    assert found.question == "What is blue?"
    assert found.steps == (
        Step("I look it up.", "search[blue]", "Blue is\na colour."),
        Step("Done.", "finish[colour]", ""),
    )


def test_log_is_split_at_questions_and_headings_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "trials_100q.txt").write_text(LOG)
    blue, red = read_trajectories(tmp_path)
    assert blue.question == "What is blue?"
    assert [step.thought for step in blue.steps] == ["I look\nit up.", "Done."]
    assert [step.observation for step in blue.steps] == ["Blue is a colour.", ""]
    assert red.steps == (Step("Hm.", "Search[red]", ""),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "expected a list of rows, found dict"),
        ("[3]", "row 0: expected an object, found int"),
        ('[{"instruction": "q"}]', "row 0: 'output' must be a text, found None"),
        ('[{"instruction": "q", "output": "free text"}]', "row 0: expected steps"),
    ],
)
def test_faults_name_file_and_row(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "hotpotqa.json").write_text(content)
    with pytest.raises(WorkloadError, match=message) as caught:
        read_trajectories(tmp_path)
    assert "hotpotqa.json" in str(caught.value)


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"neither hotpotqa\.json nor"):
        read_trajectories(tmp_path)


def test_a_log_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a100q.txt").write_text("nothing here\n")
    with pytest.raises(WorkloadError, match="no line begins with 'Question:'"):
        read_trajectories(tmp_path)


def test_the_real_files(shared_data: Path) -> None:
    found = read_trajectories(shared_data / "react_traces")
    assert len(found) > 900
    steps = [step for trajectory in found for step in trajectory.steps]
    assert all(trajectory.question and trajectory.steps for trajectory in found)
    assert sum(bool(step.thought) for step in steps) > 0.99 * len(steps)


@pytest.mark.real_model
def test_built_in_lengths_are_those_of_the_real_files(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REPOSITORY / ".cache/models/smollm2-135m-instruct")
    found = choose_lengths(shared_data / "react_traces", tokenizer)
    for field in fields(found):
        if field.name != "source":
            values = getattr(found, field.name).values
            assert values == pytest.approx(getattr(BUILT_IN, field.name).values, abs=0.5)
