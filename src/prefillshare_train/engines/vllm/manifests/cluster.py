"""What compose file and Kubernetes manifests both say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefillshare_train.engines.vllm.topology import Pool

HTTP_PORT = 8000
"""On which every instance and the router listen inside their containers."""
CONFIG_PLACE = "/etc/prefillshare/router.yaml"
STORE_PLACE = "/var/lib/prefillshare/store"
ROUTER_COMMAND = ("python3", "-m", "prefillshare_train.engines.vllm.router", CONFIG_PLACE)
HUB_PLACE = "/var/lib/prefillshare/hub"
"""Where containers keep what they fetch from the hub."""
HUB_TOKEN = "HF_TOKEN"
DRAIN_S = 30
"""How long running requests may go on after SIGTERM."""
KEYS = ("PREFILLSHARE_API_KEY", "VLLM_API_KEY")
"""Secrets: what clients send to the router, and what the router sends to the instances."""


@dataclass(frozen=True)
class PoolLaunch:
    """A pool with what starts one of its instances.

    Attributes:
        pool: who it is.
        command: the process, the interpreter first.
        environment: variables that it needs.
        side_channel: whether others reach it for NIXL's handshake, at the address that
            `VLLM_NIXL_SIDE_CHANNEL_HOST` must then name.
    """

    pool: Pool
    command: tuple[str, ...]
    environment: Mapping[str, str]
    side_channel: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster runs.

    Attributes:
        launches: of every pool, the prefill pool first.
        router: options of the router but for addresses, which compose and Kubernetes name
            differently.
        image: with vLLM and this package.
        model_root: folder in the containers under which models lie.
        models: name under `model_root` to the place here that it comes from; empty text where a
            model comes from the hub.
        gpus: of each instance; 0 for CPU builds.
        cpus, memory_gib: of each instance.
        store_gib: size of the store; None on the route that has none.
        max_replicas: to which autoscaling may take a pool.
        namespace: of Kubernetes.
        monitoring_namespace: from which Prometheus reads the metrics of instances.
    """

    launches: tuple[PoolLaunch, ...]
    image: str
    model_root: str
    models: Mapping[str, str]
    gpus: int
    cpus: int
    memory_gib: int
    store_gib: int | None
    max_replicas: int
    namespace: str
    monitoring_namespace: str

    @property
    def from_hub(self) -> bool:
        """Whether a model is fetched from the hub, which may ask for a token."""
        return not all(self.models.values())

    @property
    def shares_store(self) -> bool:
        """Whether instances read blocks that others wrote: not so where one process does both."""
        return any(launch.pool.role != "both" for launch in self.launches)
