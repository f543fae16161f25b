"""Throughput of training steps, by formulas that docs/method.md states."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from prefillshare_train.core.cost import matmul_parameters, step_flops
from prefillshare_train.core.packing import BatchLayout


class ThroughputMeter:
    """Counts tokens, FLOPs and seconds of training steps between two logs.

    Args:
        causal_lm: the decoder, without a PEFT wrapper.
        full: its own weights are trained (not adapters).
        peak_tflops: what a device reaches at best; MFU is reported when given.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        full: bool,
        checkpointing: bool,
        peak_tflops: float | None = None,
    ) -> None:
        self._config = causal_lm.config
        self._stack, self._head = matmul_parameters(causal_lm)
        self._full = full
        self._checkpointing = checkpointing
        self._peak = peak_tflops
        self._clear()

    def _clear(self) -> None:
        self._seconds = 0.0
        self._response = self._prompt = self._base = self._shared = self._decoder = 0
        self._flops = 0

    @contextlib.contextmanager
    def step(self, layout: BatchLayout) -> Iterator[None]:
        """Time one micro-batch."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start
        self._response += layout.response_tokens
        self._prompt += layout.prompt_tokens
        self._base += layout.prefill.tokens
        self._shared += layout.prefill.shared_tokens
        self._decoder += sum(g.count * g.query_length for g in layout.decode_groups)
        self._flops += self.flops(layout)

    def flops(self, layout: BatchLayout) -> int:
        """FLOPs of one micro-batch, prefill, forward and backward."""
        return step_flops(
            layout,
            stack=self._stack,
            head=self._head,
            config=self._config,
            trains_base_weights=self._full,
            checkpointing=self._checkpointing,
        )

    def drain(self) -> dict[str, float]:
        """What was counted since the last call, as rates; empty before the first step.

        `shared_prefix_share` is the share of the base's prompt tokens that another prompt of the
        micro-batch had run. `padding_share` is 0 by construction: batches are packed.
        """
        if not self._seconds:
            return {}
        rates: dict[str, Any] = {
            "response_tokens_per_s": self._response / self._seconds,
            "prompt_tokens_per_s": self._prompt / self._seconds,
            "tokens_per_s": (self._prompt + self._response) / self._seconds,
            "tflops": self._flops / self._seconds / 1e12,
            "base_token_share": self._base / (self._base + self._decoder),
            "shared_prefix_share": self._shared / max(1, self._base + self._shared),
            "padding_share": 0.0,
            "peak_memory_mib": peak_memory_mib(),
        }
        if self._peak:
            rates["mfu"] = rates["tflops"] / self._peak
        self._clear()
        return {key: round(value, 5) for key, value in rates.items()}


def measured_tflops(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int = 2048,
    repeats: int = 11,
) -> float:
    """TFLOP/s of a plain product of a model's MLP shape over so many tokens, a median."""
    text = config.get_text_config()
    draw = torch.Generator(device).manual_seed(0)  # training's own must not move
    left, right = (
        torch.randn(rows, text.hidden_size, device=device, dtype=dtype, generator=draw)
        for rows in (tokens, text.intermediate_size)
    )
    # On a GPU several together: one is done before a clock can be read.
    count = 1 if device.type == "cpu" else 20
    seconds = []
    for _ in range(repeats):
        _wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            torch.nn.functional.linear(left, right)
        _wait_for(device)
        seconds.append((time.perf_counter() - start) / count)
    return 2 * left.numel() * right.shape[0] / statistics.median(seconds) / 1e12


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_mib() -> float:
    """Highest memory so far in MiB: of the CUDA allocator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
