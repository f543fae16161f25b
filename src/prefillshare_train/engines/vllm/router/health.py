"""Health checks: which replicas answer, serve what they should, and are new processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import httpx
from prometheus_client.parser import text_string_to_metric_families

from prefillshare_train.engines.vllm.router.config import RouterConfig
from prefillshare_train.engines.vllm.router.metrics import RouterMetrics
from prefillshare_train.engines.vllm.router.replicas import Fleet, Replica

_LOG = logging.getLogger(__name__)
_SLOW_CHECKS = 3
"""Checks in a row that may time out: an instance with a full step to run answers late."""
_STARTED = "process_start_time_seconds"
_CACHE = "vllm:cache_config_info"


class _NotUpError(Exception):
    """A check has failed; says why."""


class HealthMonitor:
    """Watches all replicas for ever."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, metrics: RouterMetrics, client: httpx.AsyncClient
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._client = client

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for replica in self._fleet.replicas.values():
                tasks.create_task(self._watch(replica))

    async def _watch(self, replica: Replica) -> None:
        slow = 0
        while True:
            replica.check_now.clear()
            try:
                await self._check(replica)
                slow = 0
            except httpx.TimeoutException:
                slow += 1
                if slow >= _SLOW_CHECKS or not replica.up:
                    _down(replica, "its health check times out")
            except (httpx.HTTPError, _NotUpError, ValueError) as error:
                _down(replica, str(error) or type(error).__name__)
            except Exception:
                _LOG.exception("the health check of %s failed", replica.address)
                _down(replica, "its health check failed in the router, see its log")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.health_interval_s):
                    await replica.check_now.wait()
                # Not at once again and again where each call to it fails and each check does not.
                await asyncio.sleep(min(0.1, self._config.health_interval_s))

    async def _check(self, replica: Replica) -> None:
        answer = await self._get(replica, "/health")
        if answer.status_code != 200:
            raise _NotUpError(f"its health check answers {answer.status_code}")
        if replica.up:
            return
        await self._check_names(replica)
        await self._look_whether_new(replica)
        replica.up = True
        replica.why_down = ""
        _LOG.info("%s is up", replica.address)

    async def _check_names(self, replica: Replica) -> None:
        answer = await self._get(replica, "/v1/models")
        if answer.status_code in (401, 403):
            raise _NotUpError("it asks for an API key that the router does not have")
        try:
            models = {model["id"]: model for model in answer.json()["data"]}
        except (ValueError, KeyError, TypeError) as error:
            raise _NotUpError("its /v1/models is not a list of models") from error
        if missing := sorted(replica.names - models.keys()):
            raise _NotUpError(
                f"it does not serve {', '.join(missing)}, only {', '.join(sorted(models))}; see "
                "--served-model-name and --lora-modules"
            )
        lengths = [model.get("max_model_len") for model in models.values()]
        known = [length for length in lengths if isinstance(length, int)]
        replica.max_model_len = min(known, default=None)

    async def _look_whether_new(self, replica: Replica) -> None:
        """Forget what an earlier process kept, and learn how much this one can keep."""
        started, blocks, block_size = None, None, None
        answer = await self._get(replica, "/metrics")
        if answer.status_code == 200:
            for family in text_string_to_metric_families(answer.text):
                for sample in family.samples:
                    if sample.name == _STARTED:
                        started = sample.value
                    elif sample.name == _CACHE:
                        blocks = _whole(sample.labels.get("num_gpu_blocks"))
                        block_size = _whole(sample.labels.get("block_size"))
        if started is None or started != replica.started:
            if replica.started is not None:
                self._metrics.restarts.labels(replica.address).inc()
            replica.kept.forget()
        replica.started = started
        if blocks and block_size:
            replica.kept.max_blocks = max(1, blocks * block_size // self._config.block_tokens)

    async def _get(self, replica: Replica, path: str) -> httpx.Response:
        return await self._client.get(replica.address + path, timeout=self._config.health_timeout_s)


def _down(replica: Replica, why: str) -> None:
    if replica.up or replica.why_down != why:
        _LOG.warning("%s is not up: %s", replica.address, why)
    replica.up = False
    replica.why_down = why


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def least_length(replicas: Iterable[Replica]) -> int | None:
    """The shortest context of the replicas that have told theirs."""
    known = [replica.max_model_len for replica in replicas]
    return min((length for length in known if length is not None), default=None)
