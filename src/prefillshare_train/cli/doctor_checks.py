"""What `prefillshare doctor` looks at: versions, devices, attention, disk, the hub."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prefillshare_train.cli.doctor_packages import Finding, known_conflicts, package_versions
from prefillshare_train.cli.doctor_vllm import vllm_python

if TYPE_CHECKING:
    from transformers import LlamaConfig

_GIB = 1 << 30
_LOW_DISK = 10 * _GIB
_LOW_SHARED_MEMORY = 1 * _GIB
_BF16_CAPABILITY = (8, 0)


def all_checks(timeout: float) -> Iterator[tuple[str, Iterator[Finding]]]:
    """Titles and what was found, in the order in which they are shown."""
    yield "Packages", package_versions()
    yield "Combinations that are known to fail", known_conflicts()
    yield "Devices", devices()
    yield "Attention", attention()
    yield "vLLM", vllm_python()
    yield "Disk", disk()
    yield "Hub", hub(timeout)


def devices() -> Iterator[Finding]:
    """Processors, memory, GPUs."""
    import psutil
    import torch

    from prefillshare_train.core.devices import has_fast_products

    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory()
    yield Finding(
        "ok",
        "CPU",
        f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads, "
        f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free",
    )
    if not has_fast_products(torch.bfloat16, "cpu"):
        yield Finding(
            "note",
            "bfloat16",
            f"this CPU ({torch.backends.cpu.get_cpu_capability()}) has no matrix products in it: "
            "many times slower than float32",
            "leave base.dtype and training.bf16 at auto; give --dtype float32 for decoders that "
            "were trained in bfloat16",
        )
    if torch.get_num_threads() > cores:
        yield Finding(
            "bad",
            "threads",
            f"{torch.get_num_threads()} threads on {cores} cores slow each other down",
            f"export OMP_NUM_THREADS={cores}",
        )
    if not torch.cuda.is_available():
        yield _no_gpu(torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        named = f"{properties.name}, {properties.total_memory / _GIB:.0f} GiB, CUDA capability "
        named += ".".join(map(str, capability))
        if capability < _BF16_CAPABILITY:
            yield Finding(
                "note",
                f"GPU {index}",
                f"{named}: no bfloat16",
                "set base.dtype to float16 or float32 and training.bf16 to false",
            )
        else:
            yield Finding("ok", f"GPU {index}", named)


def _no_gpu(cuda: str | None) -> Finding:
    if cuda is None:
        return Finding("ok", "GPU", "none, and PyTorch is a CPU build")
    if shutil.which("nvidia-smi"):
        return Finding(
            "bad",
            "GPU",
            f"PyTorch for CUDA {cuda} finds none, though nvidia-smi is there",
            "run nvidia-smi: the driver must be as new as that CUDA, and CUDA_VISIBLE_DEVICES "
            f"(now {os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}) must not hide the GPUs",
        )
    return Finding(
        "note",
        "GPU",
        f"none; PyTorch is built for CUDA {cuda}",
        "PyTorch's CPU wheels are smaller by several GB; see CONTRIBUTING.md",
    )


def attention() -> Iterator[Finding]:
    """Run a tiny model through each attention that transformers offers, and through ours."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.float16
    ids = torch.arange(1, 9, device=device)[None]
    expected = None
    for name in ("sdpa", "eager", "flash_attention_2", "flash_attention_3"):
        try:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(
                _tiny_config(), dtype=dtype, attn_implementation=name
            ).to(device)
            with torch.no_grad():
                logits = model.eval()(ids).logits
        except Exception as error:  # whatever a backend raises is the answer
            yield Finding("note", name, f"not here: {_first_line(error)}")
            continue
        expected = logits if expected is None else expected
        difference = (logits - expected).abs().max().item()
        fits = difference < (1e-4 if dtype == torch.float32 else 1e-2)
        if fits:
            yield Finding("ok", name, f"works on {device}")
        else:
            yield Finding(
                "bad", name, f"differs from sdpa by {difference:.2g} on {device}", "do not use it"
            )
    yield _own_attention(device)


def _tiny_config() -> LlamaConfig:
    """A new one each time: loading a model notes its attention in the configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip


def _own_attention(device: str) -> Finding:
    """A decoder equal to its base must answer off the cache what the base answers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from prefillshare_train.core.generate import generate
    from prefillshare_train.core.modules import PrefillModule

    try:
        torch.manual_seed(0)
        model = (
            AutoModelForCausalLM.from_config(_tiny_config(), dtype=torch.float32).to(device).eval()
        )
        prompt = torch.arange(1, 9, device=device)[None]
        plain = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
        cache = PrefillModule(model).prefill([prompt[0, :-1].tolist()])
        (answer,) = generate(model, cache, prompt.tolist(), max_new_tokens=6, stop_ids=())
    except Exception as error:
        return Finding("bad", "prefillshare", _first_line(error), "please report this")
    if answer != plain[0, 8:].tolist():
        return Finding(
            "bad",
            "prefillshare",
            "an answer off the cache differs from one without",
            "please report this, with the versions above",
        )
    return Finding("ok", "prefillshare", f"answers off a shared cache on {device}")


def disk() -> Iterator[Finding]:
    """Room where models, runs and temporary files go."""
    from huggingface_hub import constants

    places = {
        "model cache": Path(constants.HF_HUB_CACHE),
        "this folder": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
    }
    for name, place in places.items():
        there = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / _GIB:.1f} GiB free at {place}"
        if not os.access(there, os.W_OK):
            yield Finding("bad", name, f"{place} cannot be written to", _move(name))
        elif free < _LOW_DISK:
            yield Finding("note", name, text, _move(name))
        else:
            yield Finding("ok", name, text)
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < _LOW_SHARED_MEMORY:
        total = shutil.disk_usage(shared).total / _GIB
        yield Finding(
            "note",
            "shared memory",
            f"{total:.2f} GiB at {shared}: too little for several processes or data workers",
            "start the container with --shm-size=8g or --ipc=host",
        )


def _move(name: str) -> str:
    return {
        "model cache": "set HF_HOME to a larger place",
        "this folder": "set training.output_dir to a larger place",
        "temporary files": "set TMPDIR to a larger place",
    }[name]


def hub(timeout: float) -> Iterator[Finding]:
    """Whether the hub answers, and whether somebody is logged in."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "note",
            "offline",
            "HF_HUB_OFFLINE is set: nothing is downloaded or pushed",
            "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to use the hub",
        )
        return
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=timeout)
        answer.raise_for_status()
    except Exception as error:
        yield Finding(
            "note",
            constants.ENDPOINT,
            f"does not answer: {_first_line(error)}",
            "check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT; local folders work "
            "without, and HF_HUB_OFFLINE=1 stops attempts",
        )
        return
    yield Finding("ok", constants.ENDPOINT, "answers")
    if get_token() is None:
        yield Finding(
            "note",
            "account",
            "nobody is logged in",
            "hf auth login, to push or read private models",
        )
    else:
        yield Finding("ok", "account", "a token is there")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
