"""Peak memory of one method's training step.

On a CPU in a process that has run no other method; on a GPU the allocator counts what is held.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch
from speed_methods import adamw, build, quiet, trainable
from speed_workloads import DEVICE, Case, Workload

MIB = 2**20
# Installed packages only: the server does not look beside the script.
_PRELOADED = [
    "matplotlib.pyplot",
    "rich.progress",
    "trl.trainer.sft_trainer",
    "prefillshare_train.training.trainer",
]
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of a process, or what a GPU's allocator holds, in MiB.

    Attributes:
        peak: highest in a step: interpreter, libraries, weights, optimizer and activations.
        libraries: before any model was loaded (on a GPU nothing).
        loaded: once the weights (a frozen base too) were loaded and before a step.
    """

    peak: float
    libraries: float
    loaded: float


def start_server() -> None:
    """Import the libraries once, so that every measuring process starts with them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    from multiprocessing.forkserver import ensure_running

    ensure_running()


def wait_for_server() -> None:
    """Return once the libraries are imported, so that nothing else runs when times are taken."""
    process = multiprocessing.get_context("forkserver").Process(target=gc.collect)
    process.start()
    process.join()


def measure(method: str, case: Case, workload: Workload, threads: int) -> PeakMemory:
    """Run a method's largest micro-batch: on a CPU in a fresh process, on a GPU in this one.

    Raises:
        RuntimeError: the process died, as it does when memory runs out.
    """
    if DEVICE.type == "cuda":
        try:
            return _step_in_the_middle(method, case, workload)
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, method, case, workload, threads)
    process = context.Process(target=_measure_here, args=arguments)
    process.start()
    sender.close()
    try:
        result: PeakMemory = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that measured the memory of {method} ended with code "
            f"{process.exitcode}; where memory ran out, lower --micro-batch"
        ) from None
    process.join()
    return result


def _measure_here(
    sender: Connection, method: str, case: Case, workload: Workload, threads: int
) -> None:
    quiet()
    torch.set_num_threads(threads)
    sender.send(_step_in_the_middle(method, case, workload))


def _step_in_the_middle(method: str, case: Case, workload: Workload) -> PeakMemory:
    """The largest micro-batch of a run under way: optimizer states and gradients exist."""
    workload = workload.largest
    libraries = _resident()
    model, run = build(method, case, workload)
    gc.collect()
    loaded = _resident()
    _forget_peak()
    optimizer = adamw(model)
    for parameter in trainable(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run(0)
    optimizer.step()
    return PeakMemory(_peak(), libraries, loaded)


def _resident() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.memory_allocated() / MIB
    resident: float = psutil.Process().memory_info().rss / MIB
    return resident


def _forget_peak() -> None:
    """Set the kernel's high-water mark back, since loading a model may stand above a step."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> float:
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    if _STATUS.exists():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB
