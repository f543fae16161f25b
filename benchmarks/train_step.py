"""A conditioned training step beside a hand-written SFT step.

    python benchmarks/train_step.py --model .cache/models/smollm2-135m-instruct

Full fine-tuning, forward and backward, no optimizer; LM head on target positions in both. The same
ids, interleaved in one process, medians. The bound is the ratio of FLOPs (`core/cost.py`); what a
plain matrix product of the model's MLP shape reaches is measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from prefillshare_train.core.attention import JOB_KEYWORD, AttentionJob
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.cost import matmul_parameters, step_flops
from prefillshare_train.core.modules import PrefillModule, attach_loss_head, load_causal_lm
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation, Turn

RULE = BoundaryRule.parse("last_token")


def matmul_rate(width: int, inner: int, dtype: torch.dtype, rows: int) -> float:
    """FLOP/s of a (rows, width) x (width, inner) product."""
    left, right = torch.randn(rows, width, dtype=dtype), torch.randn(inner, width, dtype=dtype)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        F.linear(left, right)
        times.append(time.perf_counter() - start)
    return 2 * rows * width * inner / statistics.median(times)


def measure(model: str, dtype: torch.dtype, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    batch, prompt, response = options.batch, options.prompt, options.response
    base, decoder, plain = (load_causal_lm(model, dtype=dtype) for _ in range(3))
    attach_loss_head(decoder)
    plain.set_attn_implementation("sdpa")
    decoder.train()
    plain.train()
    torch.manual_seed(0)
    ids = torch.randint(0, base.config.vocab_size, (batch, prompt + response))
    rows = [Conversation(tuple(row.tolist()), (Turn(prompt, prompt + response, 1),)) for row in ids]
    packed = pack(rows, RULE)
    prefill = PrefillModule(base)

    def conditioned() -> float:
        cache = prefill.prefill_packed(packed)
        job = AttentionJob(packed["layout"].decode_groups, past=cache)
        keys = ("input_ids", "position_ids", "labels", "target_index")
        loss = decoder(**{key: packed[key] for key in keys}, **{JOB_KEYWORD: job})["nll"]
        (loss / (batch * response)).backward()
        return loss.item() / (batch * response)

    def sft() -> float:
        hidden = plain.base_model(ids[:, :-1], use_cache=False).last_hidden_state[:, prompt - 1 :]
        logits = plain.get_output_embeddings()(hidden).float().flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, prompt:].flatten())
        loss.backward()
        return loss.item()

    steps: dict[str, Callable[[], float]] = {"prefillshare": conditioned, "sft": sft}
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    for number in tqdm(range(options.rounds + 1), desc=str(dtype), leave=False):
        for name, step in steps.items():
            start = time.perf_counter()
            losses[name] = step()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    if abs(losses["sft"] - losses["prefillshare"]) > tolerance * losses["sft"]:
        raise SystemExit(f"the two steps have different losses: {losses}")
    seconds = {name: statistics.median(values) for name, values in times.items()}
    stack, head = matmul_parameters(base)
    flops = {
        name: step_flops(
            pack(rows, RULE, method)["layout"],
            stack=stack,
            head=head,
            config=base.config,
            trains_base_weights=True,
            checkpointing=False,
        )
        for name, method in (("prefillshare", "prefillshare"), ("sft", "full_prompt"))
    }
    config = base.config
    rate = matmul_rate(config.hidden_size, config.intermediate_size, dtype, batch * prompt)
    ratio, bound = seconds["sft"] / seconds["prefillshare"], flops["sft"] / flops["prefillshare"]
    return [
        str(dtype).removeprefix("torch."),
        *(f"{batch * response / seconds[name]:.0f}" for name in ("sft", "prefillshare")),
        f"{ratio:.2f}",
        f"{bound:.2f}",
        f"{ratio / bound:.2f}",
        *(f"{flops[name] / seconds[name] / rate:.2f}" for name in ("sft", "prefillshare")),
        f"{rate / 1e9:.0f}",
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    table = Table(
        title=f"P={options.prompt} R={options.response} batch {options.batch}, "
        f"{torch.get_num_threads()} threads; response tokens/s"
    )
    for column in ("dtype", "sft", "ours", "ratio", "FLOP bound", "ratio/bound"):
        table.add_column(column, justify="right")
    for column in ("sft of matmul", "ours of matmul", "matmul GFLOP/s"):
        table.add_column(column, justify="right")
    for dtype in (torch.float32, torch.bfloat16):
        table.add_row(*measure(options.model, dtype, options))
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
