"""Rows of particular data sets, as their files lie."""

from __future__ import annotations

import re
from typing import Any

from prefillshare_train.data.errors import RowError, shorten
from prefillshare_train.data.formats import alpaca, earlier_turns, with_system
from prefillshare_train.data.rows import Record, Row, Scoring, make_row, parse_json, text_of
from prefillshare_train.data.tool_schema import function_tool, type_schema

# Sums only: code and prose may hold << and >> too.
_CALCULATOR = re.compile(r"<<[\d\s.,()+*/%$-]*=[\d\s.,()+*/%$-]+>>")
_REACT_STEP = re.compile(r"^(Thought|Action|Observation)\s*\d*:", re.MULTILINE)

CODE_REQUEST = (
    "Complete this Python function. Answer with the whole function in one fenced code block.\n\n"
    "```python\n{prompt}\n```"
)
CODE_ANSWER = "```python\n{solution}\n```"


def _question_and_answer(record: Record, question: str, answer: str, **options: Any) -> Row:
    conversation = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return make_row(record, conversation, **options)


def metamath(record: Record) -> Row:
    """MetaMathQA: `query` and `response`, which ends in "The answer is: N".

    Other sets have these columns too, with `system` and `history` as `alpaca` reads them; a
    response without that ending is compared as text.
    """
    answer = text_of(record, "response")
    conversation = [
        *earlier_turns(record),
        {"role": "user", "content": text_of(record, "query")},
        {"role": "assistant", "content": answer},
    ]
    scoring: Scoring = "math" if "answer is" in answer.lower() else "text"
    return make_row(record, with_system(record, conversation), scoring=scoring)


def evol_instruct_code(record: Record) -> Row:
    """EvolInstruct-Code: `instruction` and `output`."""
    return alpaca(record)


def gsm8k(record: Record) -> Row:
    """GSM8K: `question` and `answer`, without the `<<48/2=24>>` calculator annotations.

    Other sets have these columns too; an answer without `####` stays as it is, and is compared as
    text.
    """
    answer = text_of(record, "answer")
    scoring: Scoring = "text"
    if "####" in answer:
        answer, scoring = _CALCULATOR.sub("", answer), "math"
    return _question_and_answer(record, text_of(record, "question"), answer, scoring=scoring)


def mbpp(record: Record) -> Row | None:
    """MBPP with model-written solutions; None where the solution failed its tests."""
    solved = record.values.get("is_solved", True)
    if str(solved).lower() != "true":
        return None
    return _question_and_answer(
        record,
        CODE_REQUEST.format(prompt=text_of(record, "prompt").strip("\n")),
        CODE_ANSWER.format(solution=text_of(record, "solution").strip("\n")),
    )


def xlam(record: Record) -> Row:
    """xLAM function calling: `query`, and `tools` and `answers` as JSON strings."""
    tools = parse_json(record.values.get("tools"), "tools", record.origin)
    answers = parse_json(record.values.get("answers"), "answers", record.origin)
    for name, value in (("tools", tools), ("answers", answers)):
        if not isinstance(value, list) or not value:
            raise RowError(
                record.origin,
                f"{name!r} should be a list of one or more but is {shorten(value)}",
                "Correct or remove the row",
            )
    conversation = [
        {"role": "user", "content": text_of(record, "query")},
        {"role": "assistant", "content": "", "tool_calls": answers},
    ]
    return make_row(record, conversation, [_xlam_tool(tool, record.origin) for tool in tools])


def _xlam_tool(tool: Any, origin: str) -> Any:
    parameters = tool.get("parameters") if isinstance(tool, dict) else None
    if not isinstance(parameters, dict) or parameters.get("type") == "object":
        return tool
    properties: dict[str, dict[str, Any]] = {}
    required = []
    for name, spec in parameters.items():
        if not isinstance(spec, dict):
            raise RowError(
                origin, f"parameter {name!r} is not an object: {shorten(spec)}", "Correct the row"
            )
        type_name, *marks = str(spec.get("type", "")).rsplit(", optional", 1)
        properties[name] = type_schema(type_name)
        properties[name] |= {key: spec[key] for key in ("description", "default") if key in spec}
        if not marks and not type_name.lower().startswith("optional") and "default" not in spec:
            required.append(name)
    return function_tool(
        str(tool.get("name", "")), str(tool.get("description", "")), properties, required
    )


def react(record: Record) -> Row:
    """ReAct trajectories in Alpaca columns, as a conversation.

    Each Thought with its Action is an assistant turn; each Observation comes back in a user turn,
    which every chat template knows. Observations after the last Action are left out.
    """
    question = text_of(record, "instruction")
    trajectory = text_of(record, "output")
    starts = list(_REACT_STEP.finditer(trajectory))
    if not starts or trajectory[: starts[0].start()].strip():
        raise RowError(
            record.origin,
            f"'output' does not begin with a Thought, Action or Observation: {shorten(trajectory)}",
            "Correct the row, or use the format alpaca",
        )
    conversation = [{"role": "user", "content": question}]
    ends = [match.start() for match in starts[1:]] + [len(trajectory)]
    for match, end in zip(starts, ends, strict=True):
        text = trajectory[match.start() : end].strip()
        role = "user" if match[1] == "Observation" else "assistant"
        if conversation[-1]["role"] == role and len(conversation) > 1:
            conversation[-1]["content"] += f"\n{text}"
        else:
            conversation.append({"role": role, "content": text})
    while len(conversation) > 1 and conversation[-1]["role"] == "user":
        conversation.pop()
    return make_row(record, conversation)
