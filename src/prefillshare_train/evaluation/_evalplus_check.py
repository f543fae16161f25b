"""Judges one answer by evalplus; comes to its end only if the answer passes base and extra tests.

Runs inside the sandbox, never outside of it: evalplus executes what a model wrote. job.json holds
`output`, `task_id`, `entry_point` and `min_time_limit`; HUMANEVAL_OVERRIDE_PATH names a data file
of the one problem.
"""

import json
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    # evalplus needs it for EvalPerf alone, and its import takes longer than judging an answer.
    sys.modules["datasets"] = ModuleType("datasets")
    sys.modules["datasets"].__dict__["load_dataset"] = None
    from evalplus.data import get_human_eval_plus, get_human_eval_plus_hash
    from evalplus.evaluate import evaluate, get_groundtruth
    from evalplus.sanitize import sanitize

    del sys.modules["datasets"]
    # Into evalplus's cache, before anything of a model is touched.
    get_groundtruth(get_human_eval_plus(), get_human_eval_plus_hash(), [])
    print("\n" + json.dumps({"ready": "evalplus"}), flush=True)
    job = json.loads(Path("job.json").read_text())
    program = sanitize(job["output"].replace("\t", "    "), job["entry_point"])
    print("\n" + json.dumps({"program": program}), flush=True)
    sample = {"task_id": job["task_id"], "solution": program}
    Path("samples.jsonl").write_text(json.dumps(sample))
    evaluate("humaneval", "samples.jsonl", parallel=1, min_time_limit=job["min_time_limit"])
    results = json.loads(Path("samples_eval_results.json").read_text())
    (row,) = results["eval"][job["task_id"]]
    base, plus = row["base_status"], row["plus_status"]
    print("\n" + json.dumps({"result": f"base tests: {base}, extra tests: {plus}"}), flush=True)
    if (base, plus) != ("pass", "pass"):
        sys.exit(1)


if __name__ == "__main__":
    main()
