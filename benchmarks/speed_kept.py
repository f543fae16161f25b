"""Settings of the training benchmark that are measured already, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from speed_plans import Plan
from speed_report import Row, write_json

_ROOT = Path(__file__).resolve().parents[1]
_MEASURED = (
    "src/prefillshare_train/core/*.py",
    "src/prefillshare_train/training/*.py",
    "benchmarks/speed_*.py",
)


class KeptRows:
    """Rows of finished settings, a file each.

    The name of a file stands for the setting, its token ids, the machine and the sources that it
    ran: figures of other code or of another machine are measured anew.
    """

    def __init__(self, folder: Path, machine: str, accumulation: int) -> None:
        self._folder = folder
        sources = hashlib.sha256()
        for pattern in _MEASURED:
            for path in sorted(_ROOT.glob(pattern)):
                sources.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
        self._run = [machine, accumulation, sources.hexdigest()]

    def path(self, plan: Plan) -> Path:
        """Where the rows of a setting lie, or would."""
        case, workload = plan.case, plan.workload
        tokens = [[c.token_ids for c in batch] for batch in workload.micro_batches]
        identity = json.dumps([*self._run, asdict(case), tokens, plan.rounds])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        checkpointing = "-checkpointing" if case.checkpointing else ""
        name = f"{Path(case.model).name}-{case.dtype}-{case.adapter}{checkpointing}"
        return self._folder / f"{name}-{workload.name.replace('/', 'x')}-{digest}.json"

    def read(self, plan: Plan) -> list[Row] | None:
        """Rows of a setting, None where it is not measured."""
        path = self.path(plan)
        if not path.is_file():
            return None
        rows: list[Row] = json.loads(path.read_text())
        return rows

    def keep(self, plan: Plan, rows: list[Row]) -> None:
        """Write the rows of a setting: complete or not at all."""
        write_json(rows, self.path(plan))
