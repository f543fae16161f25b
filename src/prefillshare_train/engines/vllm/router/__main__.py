"""`python -m prefillshare_train.engines.vllm.router FILE`: the router as a process of its own."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.run import run_router


def main(arguments: list[str]) -> int:
    """Serve what the file says; 2 where it cannot be."""
    if len(arguments) != 1:
        print("usage: python -m prefillshare_train.engines.vllm.router FILE", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # A line for each health check of each instance would bury the rest.
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run_router(RouterConfig.load(Path(arguments[0])))
    except VllmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
