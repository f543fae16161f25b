"""`prefillshare vllm up --lora` on real vLLM: exported decoders, asked through the router."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from openai import OpenAI
from tests.vllm.conftest import READY_S, free_ports
from tests.vllm.models import Models

from prefillshare_train.core.contract import Contract
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.data import make_renderer, saved_renderer
from prefillshare_train.data.generation_header import generation_header
from prefillshare_train.hub.export import ExportOptions, export_decoder

RULES = {"plain": "last_token", "header": "generation_prompt"}
MESSAGES: list[Any] = [
    {"role": "user", "content": "Name three things that the harbour received. " * 9}
]
MAX_TOKENS = 12
COMMAND = [sys.executable, "-c", "from prefillshare_train.cli.main import main; main()"]


@pytest.fixture(scope="module")
def exported(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRA decoders as `prefillshare export` writes them, one in the aLoRA format."""
    place = tmp_path_factory.mktemp("exported")
    renderer = make_renderer(models.tokenizer)
    folders = {}
    for (name, rule), source in zip(RULES.items(), ("lora-ada", "lora-bob"), strict=True):
        trained = place / f"trained-{name}"
        contract = dataclasses.replace(
            Contract.load(models.folders[source]), prompt=renderer.prompt_contract(), boundary=rule
        )
        trained.mkdir()
        for file in models.folders[source].iterdir():
            (trained / file.name).write_bytes(file.read_bytes())
        renderer.saved_tokenizer().save_pretrained(trained)
        contract.save(trained)
        options = ExportOptions(format="alora" if name == "header" else "hf")
        folders[name] = export_decoder(trained, place / name, options)
    return folders


@dataclasses.dataclass
class Up:
    """A running `prefillshare vllm up`."""

    process: subprocess.Popen[bytes]
    url: str
    output: Path


@pytest.fixture(scope="module")
def up(
    models: Models, exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Up]:
    place = tmp_path_factory.mktemp("up")
    port, first = free_ports(2)
    command = [*COMMAND, "vllm", "up", "--lora", "--base", str(models.base)]
    command += [f"--decoder={name}={folder}" for name, folder in exported.items()]
    command += ["--vllm-python", sys.executable, "--run-dir", str(place / "run")]
    command += ["--port", str(port), "--instance-port", str(first), "--block-size=32"]
    command += ["--max-model-len=1024", "--kv-gib=1", "--store", str(place / "store")]
    command += ["--store-gib=0.5", "--restarts=0", "--drain-timeout-s=5"]
    output = place / "output.txt"
    with output.open("wb") as file:
        environment = os.environ | {"XDG_STATE_HOME": str(place / "state")}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        end = time.monotonic() + READY_S
        while "serving plain, header at" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.2)
        yield Up(process, f"http://127.0.0.1:{port}/v1", output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def reference(folder: Path) -> str:
    """What `core.generate` answers."""
    loaded = load_decoder(folder, dtype=torch.float32)
    renderer = saved_renderer(folder, loaded.contract.prompt)
    prompt = renderer.prompt_ids(MESSAGES)
    shared = loaded.contract.rule.base_length(len(prompt), len(generation_header(renderer)))
    (answer,) = generate(
        loaded.decoder,
        loaded.prefill.prefill([prompt[:shared]]),
        [prompt],
        max_new_tokens=MAX_TOKENS,
        stop_ids=renderer.end_token_ids,
    )
    return renderer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("name", RULES)
def test_an_exported_decoder_answers_as_core_generate(
    up: Up, exported: dict[str, Path], name: str
) -> None:
    client = OpenAI(base_url=up.url, api_key="none", max_retries=0, timeout=60)
    answer = client.chat.completions.create(
        model=name, messages=MESSAGES, temperature=0, max_tokens=MAX_TOKENS
    )
    assert answer.choices[0].message.content == reference(exported[name])


def test_a_signal_ends_every_process(up: Up) -> None:
    running = psutil.Process(up.process.pid).children(recursive=True)
    assert len(running) >= 2, "vLLM and the router"
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(60) == 0, up.output.read_text()
    _, alive = psutil.wait_procs(running, timeout=5)
    assert alive == []


def test_a_decoder_of_another_base_is_refused_before_anything_starts(
    models: Models, exported: dict[str, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in exported["plain"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    contract = dataclasses.replace(Contract.load(other), base_fingerprint="sha256:" + "1" * 64)
    contract.save(other)
    command = [*COMMAND, "vllm", "up", "--lora", "--base", str(models.base)]
    command += [f"--decoder=other={other}", "--vllm-python", sys.executable]
    command += ["--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert models.base_fingerprint in done.stderr
    assert contract.base_fingerprint in done.stderr
    assert not (tmp_path / "run").exists()
