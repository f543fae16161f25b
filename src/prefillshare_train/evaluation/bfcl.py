"""BFCL v4, categories `simple_python` and `multiple`: function calls, checked by their syntax tree.

Prompts, tools and verdicts come from BFCL's own code (see `bfcl_scoring`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from prefillshare_train.data import parse_tool_calls
from prefillshare_train.evaluation.bfcl_scoring import (
    DEFAULT_ENVIRONMENT,
    REQUIREMENTS,
    VERSION,
    ensure_environment,
    prepare,
    score,
)
from prefillshare_train.evaluation.records import write_text
from prefillshare_train.evaluation.task import EvalItem, EvaluationError, Judged, Verdict

Category = Literal["simple_python", "multiple"]
Style = Literal["chat_template", "prompting"]

# Registered models of BFCL whose handlers read answers as each style writes them.
_OFFICIAL_MODEL: dict[Style, str] = {
    "chat_template": "Qwen/Qwen3-8B-FC",
    "prompting": "Qwen/Qwen3-8B",
}


class BfclTask:
    """One BFCL category in one prompt style; a `Task`.

    `chat_template`: the functions are the chat template's tools, and calls are read from the
    answer as `parse_tool_calls` does. `prompting`: BFCL's default system prompt lists the
    functions, and BFCL's own decoder reads the answer as Python calls. In both, function names
    keep their dots, and BFCL's hint on Python syntax ends each description.
    """

    def __init__(
        self,
        category: Category,
        data_dir: Path | None = None,
        *,
        style: Style = "chat_template",
        env_dir: Path = DEFAULT_ENVIRONMENT,
        max_new_tokens: int = 256,
    ) -> None:
        """Read the data and have BFCL make the prompts; makes BFCL's environment where absent.

        Args:
            category: which of BFCL's categories.
            data_dir: a folder with `BFCL_v4_<category>.json`, and the file of the same name under
                `possible_answer/`; None takes the files in the bfcl-eval package.
            style: how functions are shown and calls are read.
            env_dir: where BFCL's environment is or will be.
            max_new_tokens: the longest answer.

        Raises:
            EvaluationError: data are missing or malformed, or BFCL's environment cannot be made.
        """
        for value, kind, name in ((category, Category, "category"), (style, Style, "style")):
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise EvaluationError(f"BFCL {name} {value!r} is unknown. Use one of {known}")
        self.name = f"bfcl_{category}"
        self._category = category
        self._style = style
        # A wrong path is found before anything is installed.
        files = _files(data_dir or ensure_environment(env_dir).data, category)
        entries, answers = (_read(file) for file in files)
        _check(entries, answers, files)
        self._environment = ensure_environment(env_dir)
        prepared = prepare(self._environment, entries, style)
        self._items = [
            EvalItem(
                item_id=entry["id"],
                messages=tuple(prompt["messages"]),
                tools=None if prompt["tools"] is None else tuple(prompt["tools"]),
                max_new_tokens=max_new_tokens,
                reference={"function": entry["function"], "ground_truth": answer["ground_truth"]},
            )
            for entry, answer, prompt in zip(entries, answers, prepared.prompts, strict=True)
        ]
        hashes = [_sha256(file) for file in files]
        official = _files(self._environment.data, category)
        is_official = hashes == [_sha256(file) for file in official]
        self.settings: dict[str, Any] = {
            "harness": "bfcl-eval",
            "version": VERSION,
            "requirements": list(REQUIREMENTS),
            "category": category,
            "style": style,
            "data": [
                {"file": str(file.relative_to(file.parents[depth])), "sha256": digest}
                for depth, (file, digest) in enumerate(zip(files, hashes, strict=True))
            ],
            "data_is_official": is_official,
            "shots": 0,
            "stop": [],
            "max_new_tokens": max_new_tokens,
            "function_names": "as in the data, dots kept",
        }
        if style == "prompting":
            self.settings["prompt_format"] = prepared.prompt_format
            digest = hashlib.sha256(prepared.system_prompt.encode()).hexdigest()
            self.settings["system_prompt_sha256"] = digest
        self.notes: tuple[str, ...] = _notes(style, is_official)

    def items(self) -> list[EvalItem]:
        """All items in BFCL's order."""
        return list(self._items)

    def judge(
        self, items: Sequence[EvalItem], outputs: Sequence[str], judged: Judged
    ) -> list[Verdict]:
        """BFCL's verdicts, of which `valid` alone decides; `extracted` holds the calls as JSON.

        All are known at once: one run of the checker takes every answer.

        Raises:
            EvaluationError: BFCL's checker does not run.
        """
        asked: list[dict[str, Any]] = []
        places: list[int] = []
        verdicts = [Verdict(False, detail="No tool call could be read from the answer.")] * len(
            items
        )
        for place, (item, output) in enumerate(zip(items, outputs, strict=True)):
            answer = self._answer(output)
            if answer is not None:
                places.append(place)
                asked.append({**item.reference, **answer})
        found = score(self._environment, self._category, asked)
        for place, line in zip(places, found, strict=True):
            verdicts[place] = Verdict(line["valid"], line["calls"], line["error"])
        for item, verdict in zip(items, verdicts, strict=True):
            judged(item, verdict)
        return verdicts

    def write_results(
        self,
        root: Path,
        items: Sequence[EvalItem],
        outputs: Sequence[str],
        model: str | None = None,
    ) -> Path:
        """Write answers as BFCL's own `generate` does, for its official runner.

        The runner scores models of its own table only, so the answers go under a name whose
        handler reads them as this style writes them: by default `Qwen/Qwen3-8B-FC` for
        `chat_template` and `Qwen/Qwen3-8B` for `prompting`. With bfcl-eval and all that it
        requires installed in an environment of its own:

            BFCL_PROJECT_ROOT=ROOT bfcl evaluate --model Qwen/Qwen3-8B-FC \\
                --test-category simple_python

        with `--partial-eval` where not all items were answered. Readable tool calls are written in
        that handler's one spelling. It skips blocks that are not JSON where we count the answer as
        unreadable, and it evaluates arguments that are expressions: run it on trusted answers only.

        Returns:
            the file, `ROOT/result/<model>/non_live/BFCL_v4_<category>_result.json`.
        """
        folder = (model or _OFFICIAL_MODEL[self._style]).replace("/", "_")
        file = root / "result" / folder / "non_live" / f"BFCL_v4_{self._category}_result.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"id": item.item_id, "result": self._official(output)}) + "\n"
            for item, output in zip(items, outputs, strict=True)
        ]
        write_text(file, "".join(lines))
        return file

    def _answer(self, output: str) -> dict[str, str] | None:
        """What the checker is given of an answer; None where no call can be read."""
        if self._style == "prompting":
            return {"output": output}
        calls = parse_tool_calls(output)
        if calls is None:
            return None
        try:
            return {"calls": json.dumps([{call["name"]: call["arguments"]} for call in calls])}
        except (ValueError, RecursionError):
            return None

    def _official(self, output: str) -> str:
        calls = parse_tool_calls(output) if self._style == "chat_template" else None
        if calls is None:
            return output
        return "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)


def _files(folder: Path, category: Category) -> tuple[Path, Path]:
    name = f"BFCL_v4_{category}.json"
    return folder / name, folder / "possible_answer" / name


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{file} cannot be read ({error}). Name the folder of BFCL v4's data, or none to take "
            "the package's own"
        ) from error
    rows = []
    # As bytes, for a text's lines also end at characters that JSON strings may hold.
    for number, line in enumerate(text.encode().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluationError(f"{file}:{number} is not JSON ({error}). Fetch it anew") from None
        if not isinstance(row, dict):
            raise EvaluationError(f"{file}:{number} is not a JSON object. Fetch it anew")
        rows.append(row)
    return rows


def _check(
    entries: list[dict[str, Any]], answers: list[dict[str, Any]], files: tuple[Path, Path]
) -> None:
    """Raise EvaluationError where these are not single-turn entries and their answers in order."""
    wanted = ({"id": str, "question": list, "function": list}, {"id": str, "ground_truth": list})
    for file, rows, keys in zip(files, (entries, answers), wanted, strict=True):
        for number, row in enumerate(rows, start=1):
            for key, kind in keys.items():
                if not isinstance(row.get(key), kind) or not row[key]:
                    raise EvaluationError(
                        f"{file}:{number}: {key!r} should be a {kind.__name__} that is not empty "
                        f"but is {row.get(key)!r:.80}. Name BFCL v4's own files"
                    )
    for number, row in enumerate(entries, start=1):
        if len(row["question"]) != 1:
            raise EvaluationError(
                f"{files[0]}:{number} has {len(row['question'])} turns; only single-turn entries "
                "can be judged. Name BFCL v4's own files"
            )
    ids = [row["id"] for row in entries]
    if not ids or len(set(ids)) < len(ids) or ids != [row["id"] for row in answers]:
        raise EvaluationError(
            f"{files[0]} and {files[1]} should hold the same ids in the same order, each once; "
            f"found {len(ids)} and {len(answers)} rows. Take both from one release of BFCL"
        )


def _notes(style: Style, is_official: bool) -> tuple[str, ...]:
    notes = [
        "BFCL's AST checker compares calls with lists of accepted values; nothing is executed.",
    ]
    if style == "chat_template":
        notes.append(
            "Tools are BFCL's function docs as JSON schema; function names keep their dots, as in "
            "BFCL's handlers of local models."
        )
    else:
        notes.append(
            "An argument written as an expression is worked out by arithmetic on literals; BFCL "
            "itself would evaluate any Python in it."
        )
    if not is_official:
        notes.append(f"The data files differ from those in bfcl-eval {VERSION}.")
    return tuple(notes)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
