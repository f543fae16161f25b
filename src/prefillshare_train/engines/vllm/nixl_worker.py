"""The NIXL connector's half beside the model: what a decoder reads it claims, before and after."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
from vllm.utils.network_utils import make_zmq_path

from prefillshare_train.engines.vllm.nixl_tickets import Claim, Grant

logger = logging.getLogger("vllm." + __name__)
_CLAIM_THREADS = 4


class _Quiet:
    """NIXL's agent, whose reads do not tell the base that they have ended.

    With stock vLLM's note the base frees the blocks at once; here that comes after the second
    claim.
    """

    def __init__(self, agent: Any) -> None:
        self._agent = agent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._agent, name)

    def make_prepped_xfer(self, *args: Any, notif_msg: bytes = b"", **values: Any) -> Any:
        return self._agent.make_prepped_xfer(*args, **values)


class ClaimingWorker(NixlPullConnectorWorker):
    """Stock reads, each between two claims.

    Args:
        claim_timeout_s: how long to wait for an answer to a claim.
    """

    nixl_wrapper: Any

    def __init__(
        self, vllm_config: Any, engine_id: str, kv_cache_config: Any, claim_timeout_s: float
    ) -> None:
        with _same_cores():
            super().__init__(vllm_config, engine_id, kv_cache_config)
        self.nixl_wrapper = _Quiet(self.nixl_wrapper)
        self._claim_timeout_ms = int(claim_timeout_s * 1000)
        self._claimants = ThreadPoolExecutor(_CLAIM_THREADS, thread_name_prefix="nixl-claim")
        self._before: dict[str, Future[Grant]] = {}
        self._after: dict[str, Future[Grant]] = {}

    def start_load_kv(self, metadata: Any) -> None:
        """Begin the reads of a step, and fail the requests that were refused."""
        for request_id, block_ids in metadata.to_fail.items():
            self._recving_metadata[request_id] = ReqMeta((block_ids,), (block_ids,), tp_size=1)
            self._failed_recv_reqs.put(request_id)
        super().start_load_kv(metadata)

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        """Read if the claim was granted; make it, and come back here, if there is none yet."""
        engine = meta.remote.engine_id
        if engine in self._invalid_remote_engines or engine not in self._remote_agents:
            self._before.pop(req_id, None)
            super()._read_blocks_for_req(req_id, meta)  # comes back after the handshake, or fails
            return
        answer = self._before.pop(req_id, None)
        if answer is None:
            # The ids as the base told them; a read replaces them by those of its memory.
            meta.claim = Claim(
                prefill=meta.remote.request_id,
                claimer=f"{self.engine_id}/{req_id}",
                prompt=meta.prompt,
                blocks=[list(group) for group in meta.remote.block_ids],
            )
            self._before[req_id] = answer = self._claim(meta)
            answer.add_done_callback(lambda _: self._ready_requests.put((req_id, meta)))
        elif self._granted(req_id, answer):
            super()._read_blocks_for_req(req_id, meta)
        else:
            self.xfer_stats.record_failed_transfer()
            self._failed_recv_reqs.put(req_id)

    def _read_blocks(self, read_spec: Any, dst_engine_id: str, request_id: str, **rest: Any) -> Any:
        """A stock read; the note of its end is sent once the request is reported as done."""
        agent = self._remote_agents[dst_engine_id][0, read_spec.remote_rank]
        note = f"{rest['remote_request_id']}:{rest['expected_consumers']}".encode()
        self._pending_recv_notifs.setdefault(request_id, []).append((agent, note))
        return super()._read_blocks(
            read_spec=read_spec, dst_engine_id=dst_engine_id, request_id=request_id, **rest
        )

    def _pop_done_transfers(self, transfers: Any) -> tuple[set[str], set[str]]:
        """Reads that have ended and were claimed again since; the others count as failed."""
        done, failed = super()._pop_done_transfers(transfers)
        for request_id in done - failed - self._recv_failures:
            done.remove(request_id)
            self._after[request_id] = self._claim(self._recving_metadata[request_id])
        for request_id in [key for key, answer in self._after.items() if answer.done()]:
            done.add(request_id)
            if not self._granted(request_id, self._after.pop(request_id)):
                self.xfer_stats.record_failed_transfer()
                failed.add(request_id)
        return done, failed

    def _claim(self, meta: Any) -> Future[Grant]:
        path = make_zmq_path("tcp", meta.remote.host, meta.remote.port)
        return self._claimants.submit(ask, path, meta.claim, self._claim_timeout_ms)

    def _granted(self, request_id: str, answer: Future[Grant]) -> bool:
        try:
            refusal = answer.result().refusal
        except (zmq.ZMQError, ValueError) as error:
            refusal = f"the base's instance does not answer: {error!r}"
        if refusal:
            logger.error("request %s fails: %s", request_id, refusal)
        return not refusal

    def shutdown(self) -> None:
        """Stop claiming, then as stock vLLM does."""
        self._claimants.shutdown(wait=False, cancel_futures=True)
        super().shutdown()


@contextlib.contextmanager
def _same_cores() -> Iterator[None]:
    """Leave this thread, which runs the model, on the cores that its instance was given.

    On a CPU stock vLLM moves it to the last core of the machine, all instances' to the same one.
    """
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def ask(path: str, claim: Claim, timeout_ms: int) -> Grant:
    """Make a claim.

    Raises:
        ValueError: the answer is none.
        zmq.ZMQError: there is no answer in time.
    """
    with zmq_ctx(zmq.REQ, path) as socket:
        socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
        socket.setsockopt(zmq.SNDTIMEO, timeout_ms)
        socket.send(claim.encode())
        return Grant.decode(socket.recv())
