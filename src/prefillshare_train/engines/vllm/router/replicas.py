"""The instances behind the router: which are up, what each has to do, and which one is next."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.kept_prefixes import KeptPrefixes, Key
from prefillshare_train.serving.router import Candidate, choose_worker

Role = Literal["prefill", "decode"]
_SESSIONS = 1 << 16
"""Sessions whose prefill replica is remembered; the longest unused is forgotten first."""


class Replica:
    """One vLLM instance.

    Attributes:
        address: its URL.
        role: `prefill` also where it serves decoders itself.
        names: what it must serve, by the names that it uses.
        up: whether it answers and serves all of them.
        why_down: for people, while it is not up.
        draining: takes no new requests; those that run may end.
        running: prefills and responses that are there or on their way.
        load_tokens: tokens of their prompts that it has to run or to hold.
        kept: what its prefix cache holds, of the base's blocks.
        max_model_len: longest prompt and response together, once it has told.
        started: when its process started, seconds since the epoch, once it has told.
        check_now: set to have its health checked at once.
    """

    def __init__(self, address: str, role: Role, kept: KeptPrefixes) -> None:
        self.address = address
        self.role = role
        self.names: set[str] = set()
        self.up = False
        self.why_down = "it has not answered yet"
        self.draining = False
        self.running = 0
        self.load_tokens = 0
        self.kept = kept
        self.max_model_len: int | None = None
        self.started: float | None = None
        self.check_now = asyncio.Event()

    @property
    def takes_requests(self) -> bool:
        """Whether new requests may be sent there."""
        return self.up and not self.draining

    @contextlib.contextmanager
    def busy(self, tokens: int) -> Iterator[None]:
        """A call of so many tokens is under way."""
        self.running += 1
        self.load_tokens += tokens
        try:
            yield
        finally:
            self.running -= 1
            self.load_tokens -= tokens

    def lost(self, why: str) -> None:
        """It does not answer: send nothing there until a health check has found it again."""
        self.up = False
        self.why_down = why
        self.check_now.set()


class Fleet:
    """All replicas, and the choice among them.

    Attributes:
        prefill: those of the base.
        pools: those of each decoder, by the names that clients use; empty for a decoder that the
            prefill replicas serve themselves.
        replicas: all of them, by address.
    """

    def __init__(self, config: RouterConfig) -> None:
        self._block_tokens = config.block_tokens
        self._index_blocks = config.index_blocks
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self.replicas: dict[str, Replica] = {}
        self.prefill = [self._replica(address, "prefill") for address in config.prefill]
        self.pools: dict[str, list[Replica]] = {}
        for replica in self.prefill:
            replica.names.add(config.base_model)
        for name, pool in config.decoders.items():
            own = [self._replica(address, "decode") for address in pool.replicas]
            for replica in own or self.prefill:
                replica.names.add(pool.model or name)
            self.pools[name] = own

    def _replica(self, address: str, role: Role) -> Replica:
        kept = KeptPrefixes(self._index_blocks)
        return self.replicas.setdefault(address, Replica(address, role, kept))

    @property
    def sessions(self) -> int:
        """Sessions whose replica is remembered."""
        return len(self._sessions)

    def why_not(self, decoder: str) -> str | None:
        """Why a decoder cannot be served now; None where it can."""
        for what, replicas in (
            ("prefill replica", self.prefill),
            (f"replica of decoder {decoder}", self.pools[decoder]),
        ):
            if replicas and not any(replica.takes_requests for replica in replicas):
                reasons = "; ".join(
                    f"{replica.address}: {'it drains' if replica.up else replica.why_down}"
                    for replica in replicas
                )
                return f"no {what} takes requests ({reasons})"
        return None

    def choose_prefill(
        self,
        keys: Sequence[Key],
        prompt_tokens: int,
        session: str | None,
        tried: Collection[str] = (),
    ) -> Replica | None:
        """The replica for a prompt, by the rule of the engine's own router; None where none is up.

        Args:
            keys: of the prompt's blocks.
            prompt_tokens: tokens of the prompt.
            session: the agent session; its last replica is preferred, and this one becomes it.
            tried: addresses that have failed this request; only taken where no other is left.
        """
        alive = _untried(self.prefill, tried)
        if not alive:
            return None
        candidates = [
            Candidate(number, replica.kept.match(keys) * self._block_tokens, replica.load_tokens)
            for number, replica in enumerate(alive)
        ]
        last = None if session is None else self._sessions.get(session)
        addresses = [replica.address for replica in alive]
        affinity = addresses.index(last) if last in addresses else None
        chosen = alive[choose_worker(candidates, prompt_tokens, affinity)]
        if session is not None:
            self._sessions[session] = chosen.address
            self._sessions.move_to_end(session)
            if len(self._sessions) > _SESSIONS:
                self._sessions.popitem(last=False)
        return chosen

    def choose_decode(self, decoder: str, tried: Collection[str] = ()) -> Replica | None:
        """The least loaded replica of a decoder's own pool; None where none is up."""
        alive = _untried(self.pools[decoder], tried)
        return min(alive, key=lambda r: (r.running, r.load_tokens), default=None)

    def end_session(self, session: str) -> None:
        """Forget where a session was."""
        self._sessions.pop(session, None)


def _untried(replicas: Sequence[Replica], tried: Collection[str]) -> list[Replica]:
    alive = [replica for replica in replicas if replica.takes_requests]
    return [replica for replica in alive if replica.address not in tried] or alive
