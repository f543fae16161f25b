"""Runs program.py in a child and says the word from standard input if the child came to the end.

Run inside the sandbox with `python -c`, standard library only; `Sandbox.run_program` explains why.
"""

import ctypes
import os
import sys
from typing import NoReturn

PR_SET_DUMPABLE = 4


def run_child(word: bytes, pipe: int) -> NoReturn:
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    with open("program.py", "rb") as file:  # noqa: PTH123
        source = file.read()
    # What a harness takes away from the program is needed afterwards.
    write, end = os.write, os._exit
    # Threads that the program leaves behind are not waited for.
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        write(pipe, word)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stdout.flush()
        end(1)
    end(0)


def main() -> None:
    # Not dumpable: the child, which runs as the same user, cannot read this process's memory.
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    word = os.urandom(32)
    answer, pipe = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        run_child(word, pipe)
    os.close(pipe)
    _, status = os.waitpid(child, 0)
    # What the child started may hold the pipe open still.
    os.set_blocking(answer, False)
    try:
        finished = os.read(answer, 64) == word
    except BlockingIOError:
        finished = False
    proof = os.read(0, 1 << 10)
    if finished:
        os.write(1, proof)
    os._exit(0 if finished else max(1, os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
