"""BFCL: prompts and verdicts on made-up functions, and its own answers as an oracle."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tests.evaluation.bfcl_cases import COFFEE, FULL, TEA, TRUTH, cases, text_of, write_data

from prefillshare_train.data.rows import normalise_tools
from prefillshare_train.evaluation.bfcl import BfclTask, Category, Style
from prefillshare_train.evaluation.bfcl_scoring import ensure_environment
from prefillshare_train.evaluation.task import EvaluationError, Verdict

REPOSITORY = Path(__file__).resolve().parents[2]
STYLES: tuple[Style, ...] = ("chat_template", "prompting")
CATEGORIES: tuple[Category, ...] = ("simple_python", "multiple")
# Their answers let a parameter be left out that their functions require.
CONTRADICTORY = {"simple_python_17", "simple_python_200"}


@pytest.fixture(scope="session")
def env_dir() -> Path:
    """Where BFCL's environment is; made where absent, and skips where it cannot be."""
    folder = REPOSITORY / ".cache" / "bfcl-env"
    try:
        ensure_environment(folder)
    except EvaluationError as error:
        pytest.skip(f"BFCL's environment is absent: {error}")
    return folder


@pytest.fixture(scope="module")
def verdicts(
    env_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Category, Style], dict[str, Verdict]]:
    """On every case, each category and style judged at once: one answer does not harm another."""
    found = {}
    for category in CATEGORIES:
        data = write_data(tmp_path_factory.mktemp(category), category)
        for style in STYLES:
            task = BfclTask(category, data, style=style, env_dir=env_dir)
            (item,) = task.items()
            answers = [text_of(case.answer, style) for case in cases(style).values()]
            tick = Mock()
            judged = task.judge([item] * len(answers), answers, tick)
            assert tick.call_count == len(answers)
            found[category, style] = dict(zip(cases(style), judged, strict=True))
    return found


def every_case() -> Iterable[tuple[Category, Style, str]]:
    return [(c, style, name) for c in CATEGORIES for style in STYLES for name in cases(style)]


@pytest.mark.parametrize(("category", "style", "name"), every_case())
def test_verdict(
    verdicts: dict[tuple[Category, Style], dict[str, Verdict]],
    category: Category,
    style: Style,
    name: str,
) -> None:
    case, verdict = cases(style)[name], verdicts[category, style][name]
    assert verdict.correct is case.correct
    assert case.detail in verdict.detail
    assert bool(verdict.detail) is not case.correct
    (verdict.extracted + verdict.detail).encode("utf-8")


@pytest.mark.parametrize("style", STYLES)
def test_extracted_are_the_calls(
    verdicts: dict[tuple[Category, Style], dict[str, Verdict]], style: Style
) -> None:
    found = verdicts["simple_python", style]
    assert json.loads(found["everything given"].extracted) == [{"tea.order": FULL}]
    assert found["prose"].extracted == ""


def test_answers_are_not_evaluated(env_dir: Path, tmp_path: Path) -> None:
    task = BfclTask(
        "simple_python",
        write_data(tmp_path, "simple_python"),
        style="prompting",
        env_dir=env_dir,
    )
    (item,) = task.items()
    marker = tmp_path / "written"
    attack = f"[tea.order(cups=0 + __import__('pathlib').Path({str(marker)!r}).write_text('x'))]"
    (verdict,) = task.judge([item], [attack], lambda *_: None)
    assert not verdict.correct
    assert "not arithmetic on literals" in verdict.detail
    assert not marker.exists()


def test_tools_of_the_chat_template(env_dir: Path, tmp_path: Path) -> None:
    task = BfclTask("multiple", write_data(tmp_path, "multiple"), env_dir=env_dir)
    (item,) = task.items()
    assert item.messages == ({"role": "user", "content": "Six cups of green tea, please."},)
    assert item.max_new_tokens == 256
    assert item.tools is not None
    assert normalise_tools(list(item.tools), "here") == list(item.tools)
    coffee, tea = (tool["function"] for tool in item.tools)
    assert (coffee["name"], tea["name"]) == ("coffee_order", "tea.order")
    assert tea["description"].startswith("Order tea. ")
    assert tea["parameters"]["type"] == "object"
    types = {key: spec["type"] for key, spec in tea["parameters"]["properties"].items()}
    assert types == {
        "cups": "integer",
        "kind": "string",
        "heat": "number",
        "extras": "array",
        "address": "object",
        "gift": "boolean",
    }
    assert tea["parameters"]["required"] == ["cups", "kind"]
    properties = coffee["parameters"]["properties"]
    assert properties["range"]["type"] == "array"
    assert properties["range"]["items"] == {"type": "number"}
    assert properties["note"]["type"] == "string"
    # The judge is given what the data say, not what the model was shown.
    assert item.reference == {"function": [COFFEE, TEA], "ground_truth": [TRUTH]}


def test_prompt_of_the_prompting_style(env_dir: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, "multiple")
    task = BfclTask("multiple", data, style="prompting", env_dir=env_dir, max_new_tokens=99)
    (item,) = task.items()
    assert item.tools is None
    assert item.max_new_tokens == task.settings["max_new_tokens"] == 99
    system, user = item.messages
    assert (system["role"], user["role"]) == ("system", "user")
    start = system["content"].index("[\n    {")
    shown = json.loads(system["content"][start:])
    assert [function["name"] for function in shown] == ["coffee_order", "tea.order"]
    assert shown[1]["parameters"] == TEA["parameters"]
    bare = system["content"][:start] + "[]\n"
    assert task.settings["system_prompt_sha256"] == hashlib.sha256(bare.encode()).hexdigest()


def test_settings_tell_data_from_the_official(env_dir: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, "simple_python")
    task = BfclTask("simple_python", data, env_dir=env_dir)
    file = data / "BFCL_v4_simple_python.json"
    assert task.name == "bfcl_simple_python"
    assert task.settings["data"][0] == {
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    assert task.settings["data_is_official"] is False
    assert any("differ" in note for note in task.notes)
    assert "system_prompt_sha256" not in task.settings
    json.dumps(task.settings)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("style", STYLES)
def test_accepted_answers_are_valid(env_dir: Path, category: Category, style: Style) -> None:
    """Every entry of the benchmark, answered with the first values that BFCL accepts."""
    task = BfclTask(category, style=style, env_dir=env_dir)
    items = task.items()
    ids = {item.item_id for item in items}
    assert len(ids) == len(items) == {"simple_python": 400, "multiple": 200}[category]
    assert task.settings["data_is_official"] is True
    for leave_out in (False, True):
        outputs = []
        for item in items:
            ((name, accepted),) = item.reference["ground_truth"][0].items()
            outputs.append(text_of([(name, chosen(accepted, leave_out))], style))
        verdicts = task.judge(items, outputs, lambda *_: None)
        wrong = {i.item_id: v.detail for i, v in zip(items, verdicts, strict=True) if not v.correct}
        assert set(wrong) == (CONTRADICTORY & ids if leave_out else set())
        assert all("Missing required" in detail for detail in wrong.values())
        shifted = task.judge(items, [*outputs[1:], outputs[0]], lambda *_: None)
        assert sum(verdict.correct for verdict in shifted) == 0


def chosen(accepted: dict[str, list[Any]], leave_out: bool) -> dict[str, Any]:
    """One accepted value a parameter; `leave_out`: none where the parameter may be absent."""
    arguments = {}
    for key, options in accepted.items():
        values = [option for option in options if option != ""]
        if values and not (leave_out and "" in options):
            arguments[key] = plain(values[0], leave_out)
    return arguments


def plain(value: Any, leave_out: bool) -> Any:
    if isinstance(value, dict):
        return chosen(value, leave_out)
    return [plain(item, leave_out) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("category", CATEGORIES)
def test_shared_data_are_the_official(env_dir: Path, shared_data: Path, category: Category) -> None:
    task = BfclTask(category, shared_data / "bfcl_v4", env_dir=env_dir)
    assert task.settings["data_is_official"] is True
    assert not any("differ" in note for note in task.notes)


def test_results_for_the_official_runner(env_dir: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path, "simple_python")
    answer = '<tool_call>{"name": "tea.order", "parameters": {"cups": 6}}'
    chat = BfclTask("simple_python", data, env_dir=env_dir)
    file = chat.write_results(tmp_path, chat.items() * 2, [answer, "prose"])
    folder = tmp_path / "result" / "Qwen_Qwen3-8B-FC" / "non_live"
    assert file == folder / "BFCL_v4_simple_python_result.json"
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["id"], second["result"]) == ("simple_python_0", "prose")
    # The pattern of the handler that reads it.
    (block,) = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", first["result"], re.DOTALL)
    assert json.loads(block) == {"name": "tea.order", "arguments": {"cups": 6}}

    prompting = BfclTask("simple_python", data, style="prompting", env_dir=env_dir)
    file = prompting.write_results(tmp_path, prompting.items(), [answer], model="some/model")
    assert file.parent.parent.name == "some_model"
    assert json.loads(file.read_text()) == {"id": "simple_python_0", "result": answer}


def test_an_entry_that_bfcl_cannot_read(env_dir: Path, tmp_path: Path) -> None:
    nameless = {key: value for key, value in TEA.items() if key != "name"}
    data = write_data(tmp_path, "simple_python", function=[nameless])
    with pytest.raises(EvaluationError, match=r"(?s)entry 'simple_python_0'.*KeyError: 'name'"):
        BfclTask("simple_python", data, env_dir=env_dir)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "simple_python_1"}, "same ids in the same order"),
        ({"question": []}, "'question' should be a list that is not empty"),
        ({"question": [[], []]}, "has 2 turns"),
        ({"function": None}, "'function' should be a list"),
    ],
)
def test_malformed_entries(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    data = write_data(tmp_path, "simple_python", **changes)
    with pytest.raises(EvaluationError, match=message):
        BfclTask("simple_python", data, env_dir=tmp_path / "never made")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", ":1: 'id' should be a str"),
        ("{}\n{\n", ":2 is not JSON"),
        ("{}\n[1]\n", ":2 is not a JSON object"),
        ("", "found 1 and 0 rows"),
    ],
)
def test_malformed_files(tmp_path: Path, content: str, message: str) -> None:
    data = write_data(tmp_path, "multiple")
    (data / "possible_answer" / "BFCL_v4_multiple.json").write_text(content)
    with pytest.raises(EvaluationError, match=f"possible_answer/BFCL_v4_multiple.json.*{message}"):
        BfclTask("multiple", data, env_dir=tmp_path / "never made")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="Name the folder of BFCL v4's data"):
        BfclTask("multiple", tmp_path, env_dir=tmp_path / "never made")


def test_unknown_category_and_style(tmp_path: Path) -> None:
    category: Any = "parallel"
    with pytest.raises(EvaluationError, match="category 'parallel' is unknown"):
        BfclTask(category, tmp_path)
    style: Any = "json"
    with pytest.raises(EvaluationError, match="Use one of chat_template, prompting"):
        BfclTask("multiple", tmp_path, style=style)
