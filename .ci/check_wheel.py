"""Install the built wheel by itself, away from the repository, and use it.

python .ci/check_wheel.py dist

Its dependencies are those of the environment that runs this; the package is the wheel's.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

PROGRAM = """
import os, sys
from importlib import resources
from importlib.metadata import distribution, entry_points
import prefillshare_train
place = os.path.dirname(prefillshare_train.__file__)
assert place.startswith(sys.argv[1]), f"not the wheel's package: {place}"
for name in prefillshare_train.__all__:
    getattr(prefillshare_train, name)
from prefillshare_train.data.template_files import packaged_templates
assert packaged_templates("chat") and packaged_templates("prompt")
for part in ("py.typed", "hub/card.md.jinja", "evaluation/task_files/gsm8k_local.yaml"):
    assert (resources.files("prefillshare_train") / part).is_file(), part
assert distribution("prefillshare-train").locate_file("").joinpath("prefillshare_train").is_dir()
from prefillshare_train.cli.main import main
sys.argv = ["prefillshare", "--help"]
main()
"""


def unmet(requirements: list[str]) -> list[str]:
    """Requirements, of every extra, that the versions in this environment contradict."""
    wrong = []
    for line in requirements:
        requirement = Requirement(line)
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{line}: here is {found}")
    return wrong


def main() -> int:
    """Command line: the folder with the wheel."""
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    with tempfile.TemporaryDirectory() as folder:
        install = ["install", "--quiet", "--no-deps", "--no-index", "--target", folder, str(wheel)]
        subprocess.run([sys.executable, "-m", "pip", *install], check=True)
        environment = {**os.environ, "PYTHONPATH": folder}
        program = [sys.executable, "-c", PROGRAM, folder]
        subprocess.run(program, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        (metadata,) = importlib.metadata.distributions(path=[folder])
        wrong = unmet(metadata.requires or [])
    for line in wrong:
        print(f"not met: {line}", file=sys.stderr)
    print(f"{wheel.name}: {'NOT ok' if wrong else 'ok'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
