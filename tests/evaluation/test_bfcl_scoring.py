"""BFCL's environment and the checker's process, without BFCL itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefillshare_train.evaluation import _bfcl_checker as checker
from prefillshare_train.evaluation import bfcl_scoring
from prefillshare_train.evaluation.bfcl_scoring import (
    BfclEnvironment,
    ensure_environment,
    prepare,
    score,
)
from prefillshare_train.evaluation.task import EvaluationError

# Stands in for the checker's script: an item's output tells it what to do.
SCRIPT = """
import json, os, pathlib, signal, sys, time

command, request, answer = sys.argv[1:]
items = json.loads(pathlib.Path(request).read_text()).get("items", [])
with open(answer, "w") as file:
    def say(value):
        file.write(json.dumps(value) + "\\n")
        file.flush()

    if any(item["output"] == "no start" for item in items):
        sys.exit("cannot import bfcl_eval")
    say({"ready": True})
    for item in items:
        if item["output"] == "die":
            file.write('{"valid": tr')
            file.flush()
            os.kill(os.getpid(), signal.SIGSEGV)
        if item["output"] == "hang":
            time.sleep(60)
        if item["output"] == "fail":
            raise RuntimeError("disk full")
        found = {"env": dict(os.environ), "cwd": os.getcwd(), "files": os.listdir(".")}
        say({"valid": item["output"] == "right", "calls": json.dumps(found), "error": ""})
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BfclEnvironment:
    """Runs SCRIPT with this interpreter."""
    script = tmp_path / "checker.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(bfcl_scoring, "_CHECKER", script)
    return BfclEnvironment(tmp_path, Path(sys.executable), tmp_path)


def valid(environment: BfclEnvironment, *outputs: str) -> list[bool]:
    items = [{"output": output} for output in outputs]
    return [line["valid"] for line in score(environment, "simple_python", items)]


def test_an_answer_that_kills_the_checker_is_the_only_wrong_one(
    environment: BfclEnvironment,
) -> None:
    assert valid(environment, "right", "die", "right", "wrong", "die", "die", "right") == [
        *[True, False, True, False],
        *[False, False, True],
    ]
    (line,) = score(environment, "multiple", [{"output": "die"}])
    assert line["error"] == f"The checker ended with status -{signal.SIGSEGV.value} on this answer."


def test_an_answer_that_hangs(
    environment: BfclEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfcl_scoring, "_START_SECONDS", 2)
    monkeypatch.setattr(bfcl_scoring, "_ITEM_SECONDS", 0)
    started = time.monotonic()
    assert valid(environment, "right", "hang", "right") == [True, False, True]
    assert time.monotonic() - started < 20


def test_no_items_need_no_checker(environment: BfclEnvironment) -> None:
    assert valid(BfclEnvironment(environment.folder, Path("/nowhere"), environment.data)) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [("no start", "cannot import bfcl_eval"), ("fail", "RuntimeError: disk full")],
)
def test_a_checker_that_fails_by_itself_is_an_error(
    environment: BfclEnvironment, output: str, message: str
) -> None:
    with pytest.raises(EvaluationError, match=rf"(?s)ended with status 1.*{message}"):
        valid(environment, "right", output)


def test_an_interpreter_that_is_gone(environment: BfclEnvironment) -> None:
    gone = BfclEnvironment(environment.folder, Path("/nowhere"), environment.data)
    with pytest.raises(EvaluationError, match=r"/nowhere does not run .*Delete"):
        prepare(gone, [], "prompting")


def test_the_checker_inherits_nothing(
    environment: BfclEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    (line,) = score(environment, "simple_python", [{"output": "right"}])
    found = json.loads(line["calls"])
    folder = found["cwd"]
    assert found["env"].pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"  # Python's own addition
    assert found["env"] == {
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "BFCL_PROJECT_ROOT": folder,
    }
    assert folder != str(Path.cwd())
    assert sorted(found["files"]) == ["answer.jsonl", "request.json"]
    assert not Path(folder).exists()


def test_the_checker_limits_itself() -> None:
    folder = str(Path(checker.__file__).parent)
    program = (
        f"import sys, resource; sys.path.insert(0, {folder!r})\n"
        "import _bfcl_checker as checker\n"
        "checker.limit_resources()\n"
        "checker.limit_resources()\n"
        "soft = [resource.getrlimit(kind)[0] for kind in\n"
        "        (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)]\n"
        "assert soft[0] <= checker.MAX_MEMORY and soft[1] <= checker.MAX_FILE and soft[2] == 0\n"
        "try:\n"
        "    bytes(4 << 30)\n"
        "except MemoryError:\n"
        "    print('limited')\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("limited\n", "")


def test_a_failed_install_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfcl_scoring, "REQUIREMENTS", (str(tmp_path / "no-such-package"),))
    with pytest.raises(EvaluationError, match=r"(?s)pip install .*ended with status 1.*ERROR: "):
        ensure_environment(tmp_path / "env")
    assert list((tmp_path / "env").iterdir()) == []


def test_a_killed_install_is_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[str]] = []

    def install(folder: Path, command: list[str]) -> None:
        steps.append(command)
        if "venv" in command:
            put_environment(Path(command[-1]))
        elif len(steps) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(bfcl_scoring, "_install_step", install)
    with pytest.raises(KeyboardInterrupt):
        ensure_environment(tmp_path)
    assert list(tmp_path.iterdir()) == []
    made = ensure_environment(tmp_path)
    assert len(steps) == 4
    assert steps[3][1:4] == ["-I", "-m", "pip"]
    assert "--no-deps" in steps[3]
    assert made.folder == tmp_path / f"bfcl-eval-{bfcl_scoring.VERSION}"
    assert made.python == made.folder / "bin" / "python"
    assert list(tmp_path.iterdir()) == [made.folder]
    assert ensure_environment(tmp_path) == made
    assert len(steps) == 4


def test_of_two_builds_at_once_the_first_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(folder: Path, command: list[str]) -> None:
        if "venv" in command:
            put_environment(Path(command[-1]))
        else:
            put_environment(folder)
            (folder / "first").touch()

    monkeypatch.setattr(bfcl_scoring, "_install_step", install)
    made = ensure_environment(tmp_path)
    assert (made.folder / "first").exists()
    assert list(tmp_path.iterdir()) == [made.folder]


def test_a_damaged_environment(tmp_path: Path) -> None:
    (tmp_path / f"bfcl-eval-{bfcl_scoring.VERSION}").mkdir()
    with pytest.raises(EvaluationError, match="Delete it to have it made again"):
        ensure_environment(tmp_path)


def put_environment(folder: Path) -> None:
    (folder / "lib" / "python3.11" / "site-packages" / "bfcl_eval" / "data").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()


@pytest.mark.parametrize(
    "expression",
    [
        "1 + 2 * 3 - 4 / 5",
        "7 // 2 % 3",
        "2 ** 10",
        "-(2 - 5) + +1",
        "2 ** -1",
        "1.5 * 4",
        "'ab' + 'cd'",
        "'ab' * 3",
        "3 * [1, 2]",
        "[1] + [2] * 2",
        "(1, 'a') + (2.5,)",
        "True + 1",
    ],
)
def test_arithmetic_is_that_of_python(expression: str) -> None:
    assert checker.arithmetic(expression) == eval(expression)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("9 ** 9 ** 9", "too large"),
        ("(2 ** 9999) ** 9999", "too large"),
        ("'a' * 10 ** 9", "too large"),
        ("10 ** 9 * [0]", "too large"),
        ("[[[0] * 1000] * 1000] * 1000", "too large"),
        ("b'a' * 20000", "too large"),
        ("'%999999999d' % 1", "too large"),
        ("x + 1", "x is not arithmetic"),
        ("open('f') + 1", r"open\('f'\) is not arithmetic"),
        ("().__class__ + 1", "is not arithmetic"),
        ("[i for i in [1]] + [1]", "is not arithmetic"),
        ("1 << 3", "is not arithmetic"),
        ("(lambda: 1) + 1", "is not arithmetic"),
        ("~1 + 1", "is not arithmetic"),
        ("f'{1}' + 'a'", "is not arithmetic"),
    ],
)
def test_arithmetic_refuses(expression: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checker.arithmetic(expression)


def fake(decode: Any = None, check: Any = None) -> Any:
    utils = SimpleNamespace(is_function_calling_format_output=lambda calls: isinstance(calls, list))
    return SimpleNamespace(
        utils=utils,
        decode=decode or (lambda output: [output]),
        check=check or (lambda *_: {"valid": True}),
    )


def test_only_valid_is_read() -> None:
    item = {"calls": "[1]"}
    odd = {"valid": True, "error": ["odd"], "error_type": "odd"}
    assert checker.verdict(fake(check=lambda *_: odd), "multiple", item) == {
        "valid": True,
        "calls": "[1]",
        "error": "",
    }
    wrong = {"valid": False, "error": [{"sub": 1}, "two"]}
    found = checker.verdict(fake(check=lambda *_: wrong), "multiple", item)
    assert found == {"valid": False, "calls": "[1]", "error": "{'sub': 1} two"}


def test_whatever_goes_wrong_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Any:
        raise KeyError("x" * 5000)

    def endless(*_: Any) -> Any:
        while True:
            pass

    monkeypatch.setattr(checker, "MAX_SECONDS", 0.2)
    item = {"output": "f()"}
    for bfcl, stage in (
        (fake(decode=raises), "No calls could be decoded: KeyError: "),
        (fake(check=raises), "The checker failed on these calls: KeyError: "),
        (fake(decode=endless), "No calls could be decoded: TimeoutError: "),
        (fake(decode=lambda _: "text"), "The output is not a list of function calls."),
    ):
        found = checker.verdict(bfcl, "multiple", item)
        assert found["valid"] is False
        assert found["error"].startswith(stage)
        assert len(found["error"]) <= checker.MAX_DETAIL
    lines = list(checker.score(fake(), {"category": "multiple", "items": [item, item]}))
    assert lines[0] == {"ready": True}
    assert [line["valid"] for line in lines[1:]] == [True, True]
