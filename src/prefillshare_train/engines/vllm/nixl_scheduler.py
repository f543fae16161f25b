"""The NIXL connector's half beside vLLM's scheduler: tickets on the base, refusals on decoders."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx
from vllm.utils.network_utils import make_zmq_path

from prefillshare_train.core.contract import ContractError
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.nixl_tickets import (
    CLAIM_MESSAGE,
    Claim,
    Grant,
    TicketBook,
    prompt_digest,
)
from prefillshare_train.engines.vllm.store_roles import Roles

logger = logging.getLogger("vllm." + __name__)
_NEEDED = {
    "remote_block_ids": list,
    "remote_engine_id": str,
    "remote_request_id": str,
    "remote_host": str,
    "remote_port": int,
    "tp_size": int,
}
_POLL_MS = 500


class TicketScheduler(NixlPullConnectorScheduler):
    """Stock pull scheduling, for prefills that are read once and decodes that read them whole.

    On the base, a finished prefill becomes a ticket; the handshake's socket answers claims. On a
    decoder, a request either has K/V to read, which the worker claims, or fails: none is
    prefilled there.
    """

    def __init__(
        self, vllm_config: Any, engine_id: str, kv_cache_config: Any, roles: Roles
    ) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._producer = vllm_config.kv_transfer_config.is_kv_producer
        self._roles = roles
        self._book = TicketBook()
        self._refusals: dict[str, str] = {}
        self._to_fail: dict[str, list[int]] = {}
        self._cannot_listen: zmq.ZMQError | None = None

    def on_new_request(self, request: Any) -> None:
        """Note what must become of a request that has arrived."""
        if self._producer:
            self._on_prefill(request)
        else:
            refusal = self._why_not(request)
            # vLLM would leave the handed-over tokens out with it, and prefill them here.
            request.skip_reading_prefix_cache = False
            if refusal:
                self._refuse(request, refusal)
                return
        super().on_new_request(request)

    def _on_prefill(self, request: Any) -> None:
        params = request.kv_transfer_params or {}
        if params.get("do_remote_prefill"):
            # The base prefills by itself, with the same result.
            request.kv_transfer_params = None
        elif params.get("do_remote_decode"):
            if not _plain(request):
                logger.error("request %s is more than token ids: no K/V", request.request_id)
                request.kv_transfer_params = None
                return
            # More tokens would fill more blocks, of which a decoder would then read the last ones.
            request.max_tokens = 1
            # K/V that a decoder holds are not wanted back.
            request.kv_transfer_params = {"do_remote_decode": True, "do_remote_prefill": False}

    def _why_not(self, request: Any) -> str:
        """Why a decoder must not run a request; empty where it may."""
        params = request.kv_transfer_params
        if not isinstance(params, dict) or not params.get("do_remote_prefill"):
            return "it brings no K/V of the base (kv_transfer_params of a prefill)"
        if params.get("do_remote_decode"):
            return "do_remote_decode: a decoder hands over nothing"
        for key, kind in _NEEDED.items():
            value = params.get(key)
            if not isinstance(value, kind) or value in ([], ""):
                return f"kv_transfer_params.{key} is {value!r}"
        if not _plain(request):
            return "its prompt is more than token ids"
        sampling = request.sampling_params
        if sampling is None:
            return "it asks for no generation"
        if sampling.prompt_logprobs is not None:
            return "prompt_logprobs: the base's part of the prompt is not run here"
        adapter = request.lora_request
        try:
            self._roles.boundary(adapter.lora_path if adapter else None)
        except ContractError as error:
            return str(error)
        return ""

    def _refuse(self, request: Any, why: str) -> None:
        if request.request_id not in self._refusals:
            self._refusals[request.request_id] = why
            logger.error("request %s fails: %s", request.request_id, why)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """All of a decoder's prompt, which then arrives or fails.

        vLLM asks again about a prompt of one token that has arrived: its last token, all there is,
        is the decoder's own, so that nothing of it counts as computed.
        """
        if self._producer:
            return 0, False
        arrived = (
            request.request_id not in self._refusals
            and not request.kv_transfer_params["do_remote_prefill"]
        )
        if arrived and request.num_prompt_tokens == 1:
            return 0, False
        if request.num_preemptions and request.request_id not in self._refusals:
            self._refuse(
                request,
                "it was preempted, and the base's K/V are gone. Fewer requests at once "
                "(--max-num-seqs) or more room for K/V avoid this",
            )
        return request.num_prompt_tokens - num_computed_tokens, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Read into the blocks that a request got, or fail it."""
        if request.request_id in self._refusals:
            if num_external_tokens:
                self._to_fail[request.request_id] = list(blocks.get_block_ids()[0])
            return
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """The worker's part of a step, with the prompts that it claims."""
        waiting = {key: entry[0] for key, entry in self._reqs_need_recv.items()}
        meta: Any = super().build_connector_meta(scheduler_output)
        for key, request in waiting.items():
            meta.reqs_to_recv[key].prompt = prompt_digest(request.prompt_token_ids)
        meta.to_fail, self._to_fail = self._to_fail, {}
        return meta

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, Any]:
        """Issue a ticket for a prefill; a decoder's blocks are freed at once."""
        self._refusals.pop(request.request_id, None)
        params = request.kv_transfer_params
        if not self._producer:
            self._stop_heartbeat(request.request_id)
            # Stock vLLM tells the base to free what was never read. Whoever tells must have
            # claimed it, or a second use of one ticket would free it under the first.
            return False, None
        delayed, handed = super().request_finished(request, block_ids)
        if delayed and handed and params and params.get("do_remote_decode"):
            tokens = request.prompt_token_ids
            needed = -(-len(tokens) // self.block_size)
            if [len(group) for group in handed["remote_block_ids"]] == [needed]:
                self._book.issue(
                    request.request_id, prompt_digest(tokens), handed["remote_block_ids"]
                )
        return delayed, handed

    def update_connector_output(self, connector_output: Any) -> None:
        """Withdraw the tickets of blocks that are about to be freed: vLLM frees them after this."""
        for request_id in connector_output.finished_sending or ():
            self._book.withdraw(request_id)
        super().update_connector_output(connector_output)

    def set_xfer_handshake_metadata(self, metadata: Any) -> None:
        """Begin to answer handshakes and claims.

        Raises:
            VllmError: the address for them cannot be listened on. Stock vLLM waits for ever then.
        """
        super().set_xfer_handshake_metadata(metadata)
        if self._cannot_listen is not None:
            raise VllmError(
                f"NIXL's side channel cannot be opened on {self.side_channel_host}:"
                f"{self.side_channel_port}: {self._cannot_listen}. Give another address with "
                "VLLM_NIXL_SIDE_CHANNEL_HOST and VLLM_NIXL_SIDE_CHANNEL_PORT"
            )

    def _nixl_handshake_listener(
        self,
        encoded_data: dict[tuple[int, int], Any],
        ready_event: Any,
        stop_event: Any,
        host: str,
        port: int,
    ) -> None:
        try:
            self._listen(encoded_data, ready_event, stop_event, host, port)
        except zmq.ZMQError as error:
            if ready_event.is_set():
                raise
            self._cannot_listen = error
            ready_event.set()

    def _listen(
        self,
        encoded_data: dict[tuple[int, int], Any],
        ready_event: Any,
        stop_event: Any,
        host: str,
        port: int,
    ) -> None:
        """Answer handshakes as stock vLLM does, and claims; whatever else comes is ignored."""
        with zmq_ctx(zmq.ROUTER, make_zmq_path("tcp", host, port)) as socket:
            socket.setsockopt(zmq.RCVTIMEO, _POLL_MS)
            ready_event.set()
            while not stop_event.is_set():
                try:
                    parts = socket.recv_multipart()
                except zmq.Again:
                    continue
                try:
                    identity, empty, message = parts
                    answer = answer_message(message, encoded_data, self._book.answer)
                    socket.send_multipart([identity, empty, *answer])
                except (ValueError, KeyError, zmq.ZMQError, msgspec.MsgspecError) as error:
                    logger.warning("a message that cannot be answered came in: %s", error)


def answer_message(
    message: bytes,
    encoded_data: dict[tuple[int, int], Any],
    grant: Callable[[Claim], Grant],
) -> list[bytes]:
    """The parts of the answer to a handshake or a claim.

    Raises:
        ValueError, KeyError, msgspec.MsgspecError: it is neither.
    """
    if message.startswith(CLAIM_MESSAGE):
        claim = Claim.decode(message)
        granted = grant(claim)
        if granted.refusal:
            logger.warning(
                "%s may not read the K/V of request %s: %s",
                claim.claimer,
                claim.prefill,
                granted.refusal,
            )
        return [granted.encode()]
    kind, pipeline_rank, tensor_rank = msgspec.msgpack.decode(message)
    if kind != GET_META_MSG:
        raise ValueError(f"unknown kind {kind!r}")
    # The clock comes along, as stock vLLM reads it off the answer.
    clock = msgspec.msgpack.encode(time.perf_counter())
    return [encoded_data[pipeline_rank, tensor_rank], clock]


def _plain(request: Any) -> bool:
    """Whether its prompt is token ids and no more."""
    return bool(request.prompt_token_ids) and not (
        request.mm_features or request.prompt_embeds is not None or request.resumable
    )
