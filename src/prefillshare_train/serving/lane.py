"""Forward passes over blocks: prompt pieces in one packed row, decoding steps row by row."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from prefillshare_train.core.attention import JOB_KEYWORD, LastLayerReached
from prefillshare_train.core.layout import Segment, group_segments, positions_of
from prefillshare_train.core.modules import causal_lm_of, run_backbone
from prefillshare_train.serving.adapters import Adapters
from prefillshare_train.serving.kv_storage import KVStorage
from prefillshare_train.serving.paged_attention import DecodeJob, PackedJob, Scratch


@dataclass(frozen=True)
class Piece:
    """Part of a prompt to be run.

    Attributes:
        ids: the tokens to run.
        past_slots: slots of all tokens before them, whose count is the first one's position.
        write_slots: where their K/V go.
    """

    ids: Sequence[int]
    past_slots: Sequence[int]
    write_slots: Sequence[int]


@dataclass(frozen=True)
class DecodeRow:
    """One response's next token to run.

    Attributes:
        token: its id.
        adapter: which of its lane's adapters runs it.
        prompt_blocks: blocks that hold the base's K/V of the prompt's first `base_tokens` tokens.
        own_blocks: blocks of the decoder's own K/V, of which `own_tokens` are written; the token's
            go next to them.
    """

    token: int
    adapter: str
    prompt_blocks: Sequence[int]
    base_tokens: int
    own_blocks: Sequence[int]
    own_tokens: int


@torch.inference_mode()
def run_pieces(
    model: PreTrainedModel, storage: KVStorage, pieces: Sequence[Piece], *, stop_early: bool
) -> None:
    """Run prompt pieces as one packed row and leave their K/V in the storage.

    Args:
        stop_early: end with the last layer's K/V, since nobody reads what follows.
    """
    device = storage.device
    segments: list[Segment] = []
    past: list[int] = []
    for piece in pieces:
        segments.append(Segment(len(piece.ids), len(past), len(piece.past_slots)))
        past.extend(piece.past_slots)
    job = PackedJob(
        storage,
        group_segments(segments),
        torch.tensor(past, device=device) if past else None,
        torch.tensor([slot for piece in pieces for slot in piece.write_slots], device=device),
        model.config.num_hidden_layers - 1 if stop_early else None,
    )
    row = torch.tensor([[i for piece in pieces for i in piece.ids]], device=device)
    positions = torch.tensor([positions_of(segments)], device=device)
    with contextlib.suppress(LastLayerReached):
        run_backbone(model, row, positions, job)


class Lane:
    """A model that decodes for one decoder, or for all LoRA decoders of a base at once."""

    def __init__(self, model: PreTrainedModel | PeftModel, adapters: Adapters) -> None:
        self.model = model
        self._adapters = adapters
        self._scratch = Scratch()

    def run_prompt_ends(self, storage: KVStorage, pieces: Sequence[Piece], adapter: str) -> None:
        """Run prompt tokens that are the decoder's, into its own blocks."""
        with self._adapters.running([adapter]):
            run_pieces(causal_lm_of(self.model), storage, pieces, stop_early=True)

    @torch.inference_mode()
    def step(self, storage: KVStorage, rows: Sequence[DecodeRow]) -> Tensor:
        """Run one token a row.

        Returns:
            Logits of the next tokens, (R, vocabulary) float32.
        """
        job, positions = self._job(storage, rows)
        device = storage.device
        with self._adapters.running([row.adapter for row in rows]) as options:
            output = self.model(
                input_ids=torch.tensor([[row.token] for row in rows], device=device),
                position_ids=positions,
                # transformers returns a 4-D mask untouched; the job makes its own.
                attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device),
                use_cache=False,
                **{JOB_KEYWORD: job},
                **options,
            )
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _job(self, storage: KVStorage, rows: Sequence[DecodeRow]) -> tuple[DecodeJob, Tensor]:
        """The rows' blocks as tensors, and their tokens' positions, (R, 1)."""
        device, size = storage.device, storage.block_tokens
        tables = [[*r.prompt_blocks, *r.own_blocks[: r.own_tokens // size + 1]] for r in rows]
        width = max(map(len, tables))
        targets = [r.own_blocks[r.own_tokens // size] * size + r.own_tokens % size for r in rows]
        held = torch.tensor([[r.base_tokens, r.own_tokens] for r in rows], device=device)
        job = DecodeJob(
            storage,
            torch.tensor([t + t[-1:] * (width - len(t)) for t in tables], device=device),
            torch.tensor(targets, device=device),
            held[:, 0],
            torch.tensor([len(r.prompt_blocks) * size for r in rows], device=device),
            held[:, 1] + 1,
            self._scratch,
        )
        return job, held.sum(dim=1, keepdim=True)
