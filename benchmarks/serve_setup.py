"""What the serving benchmarks run on: a base, decoders, sessions and K/V budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

from prefillshare_train.cli.bench_targets import engine_config, identity_of
from prefillshare_train.core.contract import (
    CONTRACT_NAME,
    Contract,
    cache_config,
    weights_fingerprint,
)
from prefillshare_train.core.modules import load_causal_lm
from prefillshare_train.data import make_renderer
from prefillshare_train.serving.engine import Engine
from prefillshare_train.serving.kv_storage import KVGeometry
from prefillshare_train.serving.models import ServedModels
from prefillshare_train.workloads.client import in_process
from prefillshare_train.workloads.metrics import Objectives
from prefillshare_train.workloads.points import Bench, DrawnWorkload, LoadPoint, PointStore
from prefillshare_train.workloads.run import choose_lengths
from prefillshare_train.workloads.sessions import Session, SessionPlan
from prefillshare_train.workloads.vocabulary import ordinary_token_ids

BLOCK_TOKENS = 16


def random_decoders(base: str, folder: Path, count: int, dtype: str) -> dict[str, Path]:
    """LoRA decoders with random, non-zero weights, made where they are missing.

    Speed does not depend on what an adapter has learnt; responses have fixed lengths.
    """
    place_of_all = folder / f"{Path(base).name}-{dtype}"
    folders = {f"agent{number}": place_of_all / f"agent{number}" for number in range(count)}
    missing = [p for p in folders.values() if not (p / CONTRACT_NAME).is_file()]
    if not missing:
        return folders
    renderer = make_renderer(AutoTokenizer.from_pretrained(base))
    fingerprint = weights_fingerprint(load_causal_lm(base, dtype=getattr(torch, dtype)))
    for number, place in enumerate(folders.values()):
        if place not in missing:
            continue
        torch.manual_seed(number)
        settings = LoraConfig(
            r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(load_causal_lm(base, dtype=getattr(torch, dtype)), settings)
        model.save_pretrained(str(place))
        renderer.saved_tokenizer().save_pretrained(str(place))
        Contract(
            base_id=base,
            base_revision=None,
            base_fingerprint=fingerprint,
            cache_config=cache_config(model.config),
            prompt=renderer.prompt_contract(),
            boundary="last_token",
            kv_dtype=dtype,
            adapter="lora",
        ).save(place)
    return folders


@dataclass(frozen=True)
class Lab:
    """A loaded base with its decoders, and the plan that sessions are drawn from.

    Attributes:
        base: folder of the base.
        dtype: of weights and K/V.
        models: base and decoders; `identity`: see `identity_of`.
        plan: of the sessions; `kind` and sizes are set by each experiment.
        out: where finished load points lie.
        objectives: limits of a good request.
    """

    base: str
    dtype: str
    models: ServedModels
    identity: dict[str, Any]
    plan: SessionPlan
    out: Path
    objectives: Objectives

    @classmethod
    def load(
        cls,
        base: str,
        decoders: dict[str, Path],
        *,
        dtype: str,
        traces: Path | None,
        system_tokens: int,
        seed: int,
        out: Path,
        objectives: Objectives,
        workload: str = "react",
    ) -> Lab:
        """Load everything once."""
        models = ServedModels.load(base, decoders, dtype=getattr(torch, dtype))
        tokenizer = models.renderer.tokenizer
        plan = SessionPlan(
            kind=workload,
            decoders=tuple(decoders),
            vocabulary=ordinary_token_ids(tokenizer),
            lengths=choose_lengths(traces, tokenizer),
            system_tokens=system_tokens,
            seed=seed,
        )
        identity = identity_of(models, decoders)
        return cls(base, dtype, models, identity, plan, out, objectives)

    def plan_of(self, point: LoadPoint) -> SessionPlan:
        """The plan of a load point; `uniform` sessions take their sizes from its variant P/R."""
        plan = replace(self.plan, kind=point.workload)
        if point.workload == "uniform":
            prompt, response = map(int, point.variant.split("/"))
            return replace(plan, system_tokens=0, context_tokens=prompt, response_tokens=response)
        return plan

    def sessions(self, workload: str, count: int, decoders: int | None = None) -> list[Session]:
        """Sessions as a load point of so many decoders would have them."""
        names = self.plan.decoders[:decoders]
        return replace(self.plan, kind=workload, decoders=names).sessions(count)

    @property
    def token_bytes(self) -> int:
        """K/V bytes of one token."""
        return KVGeometry.of(self.models.base).token_bytes

    def kv_bytes(self, plan: SessionPlan, at_once: int, copies: int, count: int) -> int:
        """K/V bytes that sessions running at once hold at their longest.

        Args:
            at_once: sessions that run at once.
            copies: of every prompt: 1 shared, the number of decoders isolated.
            count: sessions of the load, of which the longest `at_once` are taken.

        Returns:
            A tenth more than that, for blocks that are partly filled.
        """
        longest = sorted((s.tokens for s in plan.sessions(count)), reverse=True)[:at_once]
        own = sum(tokens - plan.system_tokens for tokens in longest)
        rounding = 2 * BLOCK_TOKENS * len(longest)
        return int(1.1 * self.token_bytes * copies * (plan.system_tokens + own + rounding))

    def session_tokens(self, plan: SessionPlan, count: int) -> int:
        """Tokens that 95 % of the sessions stay within: what a reservation holds."""
        return int(np.percentile([s.tokens for s in plan.sessions(count)], 95))

    def bench(self, variant: dict[str, Any] | None = None) -> Bench:
        """Runs load points on fresh engines; finished ones are read."""
        setup = {
            "base": self.base,
            "dtype": self.dtype,
            "identity": self.identity,
            "lengths": self.plan.lengths.source,
            "system_tokens": self.plan.system_tokens,
            "context_tokens": self.plan.context_tokens,
            "seed": self.plan.seed,
            **(variant or {}),
        }
        return Bench(
            workload_of=lambda point: DrawnWorkload(self.plan_of(point)),
            client_of=lambda point: in_process(Engine(self.models, engine_config(point))),
            store=PointStore(self.out / "points", setup),
            objectives=self.objectives,
        )


def decoders_of(texts: Sequence[str]) -> dict[str, Path]:
    """Read `name=folder`.

    Raises:
        SystemExit: one is not like that.
    """
    found = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not folder or not Path(folder).is_dir():
            raise SystemExit(f"--decoder {text}: give name=folder, where the folder is a decoder's")
        found[name] = Path(folder)
    return found
