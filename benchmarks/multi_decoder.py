"""Training D LoRA decoders on one prefill, beside D runs one after another and the bound on FLOPs.

    python benchmarks/multi_decoder.py [--model .cache/models/smollm2-135m-instruct] [--decoders 4]
                                       [--prompt 512] [--response 64] [--steps 3] [--rounds 3]
                                       [--setting float32:4 --setting bfloat16:16 ...]

A setting is a dtype and the number of conversations in a batch. Each round trains one decoder by
itself and then D at once, on the same synthetic rows in this process, and compares the seconds a
step, the first step of each run left out; medians over the rounds. D separate runs do the same work
D times, so their time is D times that of one. The bound is the ratio of FLOPs by the formula in
docs/method.md: D separate runs prefill D times, one run of D decoders once. Rates of the prefill
and of a decoder's step show what keeps a setting from it. Writes
benchmarks/results/multi_decoder.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.cost import matmul_parameters, step_flops
from prefillshare_train.core.decoder_set import twin_of
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.core.packing import pack
from prefillshare_train.core.shared_prefill import SharedPrefill
from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.lockstep import Lockstep, TakeTurns, generator_states
from prefillshare_train.training.trainer import CacheConditionedTrainer
from prefillshare_train.workloads.files import write_json
from prefillshare_train.workloads.machine import machine

RESULTS = Path(__file__).parent / "results" / "multi_decoder.json"


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


@dataclass(frozen=True)
class Flops:
    """Of a step: the base's prefill, and one decoder's forward and backward."""

    prefill: int
    decoder: int

    def bound(self, decoders: int) -> float:
        """FLOPs of so many separate steps over those of one step of so many decoders."""
        separate = decoders * (self.prefill + self.decoder)
        return separate / (self.prefill + decoders * self.decoder)


@dataclass(frozen=True)
class Setting:
    """What a row measures, beside the lengths that all rows have in common."""

    dtype: str
    batch: int

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From `float32:4`.

        Raises:
            argparse.ArgumentTypeError: it is no dtype and number.
        """
        dtype, _, batch = text.partition(":")
        if dtype not in ("float32", "bfloat16") or not batch.isdigit() or int(batch) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is not like float32:4 or bfloat16:16")
        return cls(dtype, int(batch))


# bfloat16 also with a batch whose decoder tokens are enough to fill its faster matrix products.
SETTINGS = (Setting("float32", 4), Setting("bfloat16", 4), Setting("bfloat16", 16))


class Bench:
    """One setting, on a base that is loaded."""

    def __init__(self, setting: Setting, options: argparse.Namespace) -> None:
        self.setting = setting
        self.options = options
        dtype = getattr(torch, setting.dtype)
        self.base: Any = load_causal_lm(options.model, dtype=dtype).requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        vocabulary, length = self.base.config.vocab_size, options.prompt + options.response
        self.rows = [
            Conversation(
                tuple(torch.randint(vocabulary, (length,), generator=draw).tolist()),
                (Turn(options.prompt, length),),
            )
            for _ in range(setting.batch * options.steps)
        ]

    def trainer(self, prefill: Any, clock: Clock) -> CacheConditionedTrainer:
        """Of one decoder."""
        config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        arguments = CacheConditionedConfig(
            output_dir="runs/bench-multi-decoder",
            per_device_train_batch_size=self.setting.batch,
            max_steps=self.options.steps,
            bf16=self.setting.dtype == "bfloat16",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            max_grad_norm=0.0,
        )
        return CacheConditionedTrainer(
            get_peft_model(twin_of(self.base), config),
            arguments,
            prefill=prefill,
            train_dataset=self.rows,
            callbacks=[clock],
        )

    def alone(self) -> float:
        """Seconds a step of one decoder with a prefill of its own."""
        clock = Clock()
        self.trainer(None, clock).train()
        return (clock.ends[-1] - clock.ends[0]) / (self.options.steps - 1)

    def together(self) -> tuple[float, float]:
        """Seconds a step of all decoders on one prefill, and those that one decoder takes of it."""
        prefill = SharedPrefill(self.base)
        lockstep: Lockstep[Any] = Lockstep(on_round=prefill.new_round)
        clocks = [Clock() for _ in range(self.options.decoders)]
        trainers = {}
        for number, clock in enumerate(clocks):
            one = self.trainer(prefill, clock)
            one.add_callback(TakeTurns(lockstep, str(number)))
            trainers[str(number)] = one
        states = {name: generator_states() for name in trainers}
        lockstep.run({name: one.train for name, one in trainers.items()}, states)
        # From the end of the first round to the end of the last; the first decoder of a round
        # waits for the prefill, those after it do not.
        steps = self.options.steps - 1
        whole = (clocks[-1].ends[-1] - clocks[-1].ends[0]) / steps
        later = [
            clocks[-1].ends[step] - clocks[0].ends[step] for step in range(1, self.options.steps)
        ]
        return whole, statistics.median(later) / (self.options.decoders - 1)

    def flops(self) -> Flops:
        """By the formula in docs/method.md."""
        config = AutoConfig.from_pretrained(self.options.model)
        with torch.device("meta"):
            stack, head = matmul_parameters(AutoModelForCausalLM.from_config(config))
        rule = BoundaryRule.parse("last_token")
        layout = pack(self.rows[: self.setting.batch], rule)["layout"]
        sizes: dict[str, Any] = {"stack": stack, "head": head, "config": config}
        whole = step_flops(layout, **sizes, trains_base_weights=False, checkpointing=False)
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        projections = config.hidden_size * (heads + 2 * config.num_key_value_heads) * head_dim
        prefill = 2 * layout.prefill.tokens * (stack * (layers - 1) / layers + projections)
        prefill += 4 * heads * head_dim * (layers - 1) * layout.prefill_pairs
        return Flops(int(prefill), whole - int(prefill))

    def measure(self) -> dict[str, Any]:
        """A row of the results."""
        alone, together, one = [], [], []
        for number in range(self.options.rounds):
            alone.append(self.alone())
            whole, each = self.together()
            together.append(whole)
            one.append(each)
            print(
                f"{self.setting.dtype}, batch {self.setting.batch}, round {number + 1}: a step of "
                f"one decoder {alone[-1]:.2f} s, of {self.options.decoders} together {whole:.2f} s",
                flush=True,
            )
        separate = self.options.decoders * statistics.median(alone)
        at_once, decoder = statistics.median(together), statistics.median(one)
        prefill = at_once - self.options.decoders * decoder
        flops = self.flops()
        bound = flops.bound(self.options.decoders)
        # Of each round's own two times: the machine's speed drifts over the rounds.
        ratios = [mine / whole for mine, whole in zip(alone, together, strict=True)]
        speedup = self.options.decoders * statistics.median(ratios)
        return {
            **asdict(self.setting),
            "separate_s": separate,
            "together_s": at_once,
            "speedup": speedup,
            "bound": bound,
            "share_of_bound": speedup / bound,
            "prefill_gflops": flops.prefill / prefill / 1e9,
            "decoder_gflops": flops.decoder / decoder / 1e9,
        }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/models/smollm2-135m-instruct")
    parser.add_argument("--decoders", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--setting", type=Setting.parse, action="append")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.decoders < 2 or options.steps < 2:
        parser.error("--decoders and --steps must be 2 or more: a first step is not timed")
    settings = options.setting or SETTINGS
    rows = [Bench(setting, options).measure() for setting in settings]
    shared = {key: getattr(options, key) for key in ("decoders", "prompt", "response", "rounds")}
    write_json(options.out, {**shared, "machine": machine(), "rows": rows})
    for row in rows:
        print(
            f"{row['dtype']}, batch {row['batch']}: {row['separate_s']:.1f} s one by one, "
            f"{row['together_s']:.1f} s on one prefill: {row['speedup']:.2f}x of at most "
            f"{row['bound']:.2f}x ({row['share_of_bound']:.0%})"
        )


if __name__ == "__main__":
    main()
