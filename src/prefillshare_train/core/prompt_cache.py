"""The prompt cache: post-RoPE K and V of prompt positions, an input to attention and not a state.

One cache holds several prompts end to end (a packed row). Layer l's keys and values have shape
(H_kv, T, D): K/V heads, tokens of all prompts together, head dimension. Nothing in it is ever
changed once recorded, so any number of decoders may read it, and gradient checkpointing may replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class PromptCache:
    """Recorded K/V of `len(lengths)` prompts.

    Attributes:
        lengths: tokens of each prompt; prompt i occupies `[starts[i], starts[i] + lengths[i])`.
        keys: one tensor of shape (H_kv, sum(lengths), D) for each layer.
        values: like `keys`.
        device: where K/V are kept once recorded; None for where they were computed.
    """

    lengths: tuple[int, ...]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    device: torch.device | None = None

    @property
    def starts(self) -> tuple[int, ...]:
        """Offset of each prompt in the packed row."""
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return tuple(starts)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(self.lengths)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the recorded K/V."""
        return self.values[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes that the K/V take."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def record(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a layer's K and V, each of shape (1, H_kv, T, D), detached from autograd.

        Raises:
            RuntimeError: layers arrive out of order (a model that skips or repeats attention calls
                is not one whose cache we can share).
        """
        if layer != len(self.keys):
            raise RuntimeError(
                f"layer {layer} recorded K/V where layer {len(self.keys)} was expected; "
                "this architecture does not call attention once per layer in order"
            )
        # autocast can leave RoPE'd keys in float32 beside bfloat16 values: one dtype for both.
        self.keys.append(key[0].detach().to(self.device, value.dtype).contiguous())
        self.values.append(value[0].detach().to(self.device).contiguous())

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> PromptCache:
        """The same cache in another dtype or on another device (itself where nothing differs)."""
        return PromptCache(
            self.lengths,
            [k.to(device=device, dtype=dtype) for k in self.keys],
            [v.to(device=device, dtype=dtype) for v in self.values],
        )

    def select(self, prompts: Sequence[int], lengths: Sequence[int] | None = None) -> PromptCache:
        """Some prompts of this cache, in the order given, each cut to its first tokens.

        Args:
            prompts: which ones.
            lengths: how many tokens of each to keep; all of them where None.

        Raises:
            ValueError: a cut is longer than what was recorded.
        """
        cuts = [self.lengths[p] for p in prompts] if lengths is None else list(lengths)
        for prompt, cut in zip(prompts, cuts, strict=True):
            if not 0 <= cut <= self.lengths[prompt]:
                raise ValueError(
                    f"prompt {prompt} has {self.lengths[prompt]} recorded tokens; {cut} asked for"
                )
        starts = self.starts
        spans = [(starts[p], starts[p] + cut) for p, cut in zip(prompts, cuts, strict=True)]

        def take(t: Tensor) -> Tensor:
            return torch.cat([t[:, a:b] for a, b in spans], dim=1)

        return PromptCache(
            tuple(cuts), [take(k) for k in self.keys], [take(v) for v in self.values]
        )

    def rows(self, prompts: Sequence[int], lengths: Sequence[int]) -> CacheRows:
        """Rows that read these prompts, each cut to its first tokens; nothing is copied."""
        return CacheRows(self, tuple(prompts), tuple(lengths))

    def extended(self, new: PromptCache) -> PromptCache:
        """Each prompt followed by the tokens that `new` recorded for it (partial prefill)."""
        if len(self.lengths) != len(new.lengths):
            raise ValueError(
                f"cannot extend {len(self.lengths)} prompts with K/V of {len(new.lengths)}"
            )
        here, there = self.starts, new.starts

        def join(a: Tensor, b: Tensor) -> Tensor:
            parts = []
            for i, (n, m) in enumerate(zip(self.lengths, new.lengths, strict=True)):
                parts += [a[:, here[i] : here[i] + n], b[:, there[i] : there[i] + m]]
            return torch.cat(parts, dim=1)

        return PromptCache(
            tuple(n + m for n, m in zip(self.lengths, new.lengths, strict=True)),
            [join(a, b) for a, b in zip(self.keys, new.keys, strict=True)],
            [join(a, b) for a, b in zip(self.values, new.values, strict=True)],
        )


@dataclass(frozen=True)
class CacheRows:
    """Rows over a cache, several of which may read one prompt; see `PromptCache.rows`.

    Attributes:
        prompts: the prompt that each row reads.
        lengths: tokens of it that the row has.
    """

    cache: PromptCache
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]

    def select(self, rows: Sequence[int]) -> PromptCache:
        """A cache of some rows, in the order given."""
        return self.cache.select([self.prompts[r] for r in rows], [self.lengths[r] for r in rows])
