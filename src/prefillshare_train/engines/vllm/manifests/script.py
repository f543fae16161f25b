"""The command lines, as a shell script that starts one process by its name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from prefillshare_train.engines.vllm.instance import InstanceOptions

LISTEN = "@LISTEN@"
"""Stands for the address to listen on."""
_MARK = re.compile(r"@([A-Z0-9_]+)@")
_HEAD = """\
#!/bin/sh
# Every process of the deployment, written by `prefillshare vllm plan`:
#   sh commands.sh NAME         NAME: {names}
# Run the instances first. On several machines set the *_HOST variables to their addresses on each
# (also for the router), LISTEN=0.0.0.0, and VLLM_API_KEY to a long random secret: the network
# between them must be private. PYTHON is the Python with vLLM and prefillshare-train.
set -eu
PYTHON=${{PYTHON:-python3}}
LISTEN=${{LISTEN:-127.0.0.1}}
"""


@dataclass(frozen=True)
class Process:
    """An instance in the script.

    Attributes:
        name: how it is asked for.
        host: variable that holds its machine's address.
        options: how it is started; marks such as `@PREFILL_0_HOST@` become variables.
    """

    name: str
    host: str
    options: InstanceOptions


def host_mark(variable: str) -> str:
    """What stands for a variable in options and in the router's file."""
    return f"@{variable}@"


def commands_script(processes: Sequence[Process], router: str) -> str:
    """The script.

    Args:
        router: the router's file, with marks.
    """
    lines = [_HEAD.format(names=", ".join([*(one.name for one in processes), "router"]))]
    lines += [f"{one.host}=${{{one.host}:-127.0.0.1}}\n" for one in processes]
    lines.append('\ncase "${1-}" in\n')
    for one in processes:
        lines.append(f"{one.name})\n")
        for name, value in one.options.variables().items():
            lines.append(f"  export {name}={_quoted(value)}\n")
        command = " \\\n    ".join(_grouped(one.options.command("@PYTHON@")))
        lines.append(f"  exec {command}\n  ;;\n")
    # Unquoted, so that the shell fills in the addresses.
    safe = re.sub(r"([\\$`])", r"\\\1", router)
    lines.append("router)\n")
    lines.append("  cat > router.yaml <<EOF\n" + _MARK.sub(r"${\1}", safe) + "EOF\n")
    lines.append('  exec "${PYTHON}" -m prefillshare_train.engines.vllm.router router.yaml\n  ;;\n')
    lines.append('*)\n  sed -n "2,4p" "$0" >&2\n  exit 2\n  ;;\nesac\n')
    return "".join(lines)


def _grouped(command: Sequence[str]) -> list[str]:
    """An option and its values a line."""
    lines: list[list[str]] = [[]]
    for text in command:
        if text.startswith("--"):
            lines.append([])
        lines[-1].append(_quoted(text))
    return [" ".join(line) for line in lines]


def _quoted(text: str) -> str:
    return _MARK.sub(r'"${\1}"', shlex.quote(text))
