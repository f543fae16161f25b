"""Options of the serving engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prefillshare_train.serving.api import ServingError

Mode = Literal["shared", "isolated"]


@dataclass(frozen=True)
class EngineConfig:
    """Options of the engine.

    Attributes:
        mode: `shared`: the base prefills for every decoder. `isolated`: each decoder finds only
            blocks that were prefilled for itself (the baseline of the benchmarks).
        kv_bytes: byte budget of the KV block pool.
        block_tokens: tokens in a block.
        max_decode_rows: responses that decode at once.
        chunk_tokens: token budget of a step: decoding rows take one each, prefill gets the rest.
        max_waiting: requests that may wait; one more is refused with `QueueFullError`.
        prefill_ahead: requests that may be prefilled or wait for a decoding row beyond those that
            decode (decode-to-prefill back-pressure).
        session_tokens: tokens reserved for each session from its first turn to its end, so that
            its blocks are still there at its next turn; 0 reserves nothing. Isolated decoders keep
            blocks of their own: so many tokens for each of them.
        session_idle_s: a session that has asked nothing for so long loses its reservation.
        staging_bytes: byte budget of the host tier that cold blocks move to; 0 for none.
        aging_tokens_per_s: a waiting prefill overtakes those with fewer tokens to run by so many
            tokens for each second it has waited.
        prefill_workers: prefill workers, each with its own share of the pool.
        prefill_addresses: `host:port` of workers started with `prefillshare prefill-worker`; they
            take the place of local ones.
        prefill_key: secret shared with them.
        disaggregated: run each prefill worker as a process of its own; the engine's process
            decodes. On CPU.

    Raises:
        ServingError: a value is out of its range; the message names it.
    """

    mode: Mode = "shared"
    kv_bytes: int = 1 << 30
    block_tokens: int = 16
    max_decode_rows: int = 16
    chunk_tokens: int = 256
    max_waiting: int = 256
    prefill_ahead: int = 4
    session_tokens: int = 0
    session_idle_s: float = 60.0
    staging_bytes: int = 0
    aging_tokens_per_s: float = 500.0
    prefill_workers: int = 1
    prefill_addresses: tuple[str, ...] = ()
    prefill_key: str = field(default="", repr=False)
    disaggregated: bool = False

    def __post_init__(self) -> None:
        least = {
            "kv_bytes": 1,
            "block_tokens": 1,
            "max_decode_rows": 1,
            "max_waiting": 1,
            "prefill_ahead": 1,
            "session_tokens": 0,
            "session_idle_s": 0,
            "staging_bytes": 0,
            "aging_tokens_per_s": 0,
            "prefill_workers": 1,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ServingError(f"{name} must be {low} or more, found {getattr(self, name)}")
        if self.prefill_addresses and (self.disaggregated or self.prefill_workers > 1):
            raise ServingError(
                "prefill_addresses are the prefill workers: leave prefill_workers and "
                "disaggregated out"
            )
        if self.prefill_addresses and not self.prefill_key:
            raise ServingError("prefill_addresses need prefill_key, the secret of their workers")
        if self.mode not in ("shared", "isolated"):
            raise ServingError(f"mode must be shared or isolated, found {self.mode!r}")
        if self.chunk_tokens <= self.max_decode_rows:
            raise ServingError(
                f"chunk_tokens ({self.chunk_tokens}) must be more than max_decode_rows "
                f"({self.max_decode_rows}), or prefill would never get a token"
            )

    @property
    def workers(self) -> int:
        """Prefill workers, wherever they are."""
        return len(self.prefill_addresses) or self.prefill_workers
