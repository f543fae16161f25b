"""Runs inside BFCL's own environment, as a script: prompts and verdicts by BFCL's own code.

    python _bfcl_checker.py prepare|score REQUEST ANSWER

Both are JSON files; ANSWER has one JSON value a line, flushed as each is known, so that what was
judged before a crash is not lost. Needs `bfcl-eval`, `tenacity` and `filelock`, and imports nothing
of prefillshare_train, which that environment does not have.
"""

from __future__ import annotations

import ast
import importlib
import json
import operator
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

# BFCL reads underscores in a model's name as slashes, so it has none.
MODEL = "prefillshare"
MAX_SECONDS = 2.0
MAX_MEMORY = 2 << 30
MAX_FILE = 256 << 20
MAX_DETAIL = 1000
MAX_LENGTH = 10_000
MAX_BITS = 10_000

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def main(arguments: list[str]) -> None:
    """Answer one request."""
    command, request, answer = arguments
    bfcl = Bfcl()
    values = json.loads(Path(request).read_text(encoding="utf-8"))
    run = {"prepare": prepare, "score": score}[command]
    limit_resources()
    with Path(answer).open("w", encoding="utf-8") as file:
        for line in run(bfcl, values):
            file.write(json.dumps(line) + "\n")
            file.flush()


class Bfcl:
    """The parts of bfcl_eval that single-turn Python categories need."""

    def __init__(self) -> None:
        """Import them without the hundred client libraries that other parts of it need."""
        # The checker looks one thing up in the table of models, and importing the real table
        # imports every vendor's client. `underscore_to_dot` False: names are as in the data.
        _stand_in(
            "bfcl_eval.constants.model_config",
            MODEL_CONFIG_MAPPING={MODEL: SimpleNamespace(underscore_to_dot=False)},
        )
        _stand_in("bfcl_eval.model_handler.parser.java_parser", parse_java_function_call=None)
        _stand_in("bfcl_eval.model_handler.parser.js_parser", parse_javascript_function_call=None)
        self.handler_utils = importlib.import_module("bfcl_eval.model_handler.utils")
        self.utils = importlib.import_module("bfcl_eval.utils")
        self.enums = importlib.import_module("bfcl_eval.constants.enums")
        self.types = importlib.import_module("bfcl_eval.constants.type_mappings")
        self.prompts = importlib.import_module("bfcl_eval.constants.default_prompts")
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        self.ast_checker: Callable[..., dict[str, Any]] = checker.ast_checker
        # Its decoder calls `eval` on arguments that are expressions. A global of that module
        # comes before the builtin, so model output is never run.
        vars(self.handler_utils)["eval"] = arithmetic

    def tools(self, functions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Function docs as OpenAI-style tools."""
        # Of the styles that wrap a function as a tool, this one leaves dots in names alone and
        # moves nothing but a `response` field, which these categories do not have.
        style = self.enums.ModelStyle.FIREWORK_AI
        converted: list[dict[str, Any]] = self.handler_utils.convert_to_tool(
            functions, self.types.GORILLA_TO_OPENAPI, style
        )
        return converted

    def decode(self, output: str) -> Any:
        """Calls in the text of a model that was prompted for them."""
        return self.handler_utils.default_decode_ast_prompting(
            output, self.enums.ReturnFormat.PYTHON, False
        )

    def check(self, category: str, item: dict[str, Any], calls: Any) -> dict[str, Any]:
        """BFCL's verdict on decoded calls."""
        return self.ast_checker(
            item["function"],
            calls,
            item["ground_truth"],
            self.enums.Language.PYTHON,
            category,
            MODEL,
        )


def prepare(bfcl: Bfcl, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The system prompt around the functions, then messages and tools of each entry."""
    default = bfcl.prompts.DEFAULT_SYSTEM_PROMPT_FORMAT
    yield {
        "prompt_format": default,
        "system_prompt": bfcl.handler_utils.formulate_system_prompt(default, []),
    }
    for raw in request["entries"]:
        (entry,) = bfcl.utils.add_language_specific_hint_to_function_doc([raw])
        messages = entry["question"][0]
        if request["style"] == "prompting":
            prompted = bfcl.handler_utils.system_prompt_pre_processing_chat_model(
                messages, entry["function"], entry["id"]
            )
            yield {"messages": prompted, "tools": None}
        else:
            yield {"messages": messages, "tools": bfcl.tools(entry["function"])}


def score(bfcl: Bfcl, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A line that says the checker is ready, then one verdict an item, whatever the item holds."""
    yield {"ready": True}
    for item in request["items"]:
        yield verdict(bfcl, request["category"], item)


def verdict(bfcl: Bfcl, category: str, item: dict[str, Any]) -> dict[str, Any]:
    """Decode and check as BFCL's runner does, except that no answer can end the run.

    Args:
        item: `function`, `ground_truth` and either `calls` (JSON text) or `output` (to be decoded).

    Returns:
        `valid`, `calls` (JSON text, empty where nothing could be decoded) and `error`.
    """
    decoded = ""
    try:
        with time_limit(MAX_SECONDS):
            calls = json.loads(item["calls"]) if "calls" in item else bfcl.decode(item["output"])
            if not bfcl.utils.is_function_calling_format_output(calls):
                return _wrong("", "The output is not a list of function calls.")
            decoded = json.dumps(calls, default=str)
            result = bfcl.check(category, item, calls)
    except Exception as error:
        stage = "The checker failed on these calls" if decoded else "No calls could be decoded"
        return _wrong(decoded, f"{stage}: {type(error).__name__}: {error}")
    if result["valid"] is not True:
        return _wrong(decoded, " ".join(str(part) for part in result["error"]))
    return {"valid": True, "calls": decoded, "error": ""}


def arithmetic(expression: str) -> Any:
    """The value of an expression of literals; stands in for `eval`.

    Raises:
        ValueError: it holds anything else (a name, a call), or its value would be huge.
    """
    return _value(ast.parse(expression, mode="eval").body)


def limit_resources() -> None:
    """Bound what a strange answer could make the parser take: memory, files, core dumps."""
    for kind, limit in (
        (resource.RLIMIT_AS, MAX_MEMORY),
        (resource.RLIMIT_FSIZE, MAX_FILE),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (allowed, hard))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes more processor time (a busy machine changes nothing)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"took more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        items = [_value(item) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if not _is_small(node.op, left, right):
            raise ValueError(f"the value of {ast.unparse(node)} is too large")
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError(f"{ast.unparse(node)} is not arithmetic on literals")


def _is_small(kind: ast.operator, left: Any, right: Any) -> bool:
    if isinstance(kind, ast.Mod):
        return not isinstance(left, str | bytes)  # which format, to any width
    if isinstance(kind, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right <= MAX_BITS
    if isinstance(kind, ast.Mult):
        for repeated, times in ((left, right), (right, left)):
            if isinstance(times, int) and not isinstance(repeated, int | float | complex):
                return _size(repeated) * times <= MAX_LENGTH
    return True


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return 1 + sum(map(_size, value)) if isinstance(value, list | tuple) else 1


def _stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def _wrong(calls: str, error: str) -> dict[str, Any]:
    # Model output may hold lone surrogates, which no UTF-8 file takes.
    plain = error.encode("utf-8", "backslashreplace").decode("utf-8")
    return {"valid": False, "calls": calls, "error": plain[:MAX_DETAIL]}


if __name__ == "__main__":
    main(sys.argv[1:])
