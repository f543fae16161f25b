"""A docker-compose file: every replica a service, on one machine with enough GPUs."""

from __future__ import annotations

from typing import Any

from prefillshare_train.engines.vllm.manifests.cluster import (
    CONFIG_PLACE,
    DRAIN_S,
    HTTP_PORT,
    HUB_PLACE,
    HUB_TOKEN,
    KEYS,
    ROUTER_COMMAND,
    STORE_PLACE,
    Cluster,
    PoolLaunch,
)
from prefillshare_train.engines.vllm.topology import Pool

ROUTER_FILE = "router.compose.yaml"
COMPOSE_HEAD = """\
# docker compose up, with PREFILLSHARE_API_KEY and VLLM_API_KEY in the environment or in .env; the
# Dockerfile beside this builds the image. Clients find the router at http://127.0.0.1:8000/v1.
# A base that is named by its hub id is fetched once, into the volume hub; HF_TOKEN in the
# environment opens a gated one.
"""
_GIB = 1 << 30


def service_addresses(pool: Pool) -> tuple[str, ...]:
    """Addresses of a pool's instances in the project's network."""
    return tuple(f"http://{name}:{HTTP_PORT}" for name in _names(pool))


def compose_file(cluster: Cluster) -> dict[str, Any]:
    """The file's content; the router's options lie beside it in `ROUTER_FILE`."""
    services: dict[str, Any] = {}
    for launch in cluster.launches:
        for name in _names(launch.pool):
            first = len(services) * cluster.gpus
            services[name] = _instance(cluster, launch, range(first, first + cluster.gpus))
    services["router"] = {
        "image": cluster.image,
        "entrypoint": list(ROUTER_COMMAND),
        "environment": {name: _required(name) for name in KEYS} | _hub(cluster),
        "ports": [f"127.0.0.1:8000:{HTTP_PORT}"],
        "configs": [{"source": "router", "target": CONFIG_PLACE}],
        "volumes": _models(cluster),
        "depends_on": {name: {"condition": "service_healthy"} for name in services},
        "healthcheck": _health("/ready", start_period="60s"),
        "restart": "unless-stopped",
        "stop_grace_period": f"{2 * DRAIN_S}s",
    }
    content: dict[str, Any] = {
        "name": "prefillshare",
        "services": services,
        "configs": {"router": {"file": f"./{ROUTER_FILE}"}},
    }
    if cluster.from_hub:
        content["volumes"] = {"hub": {}}
    if cluster.store_gib is not None:
        size = (cluster.store_gib + max(1, cluster.store_gib // 10)) * _GIB
        options = {"type": "tmpfs", "device": "tmpfs", "o": f"size={size}"}
        store = {"driver": "local", "driver_opts": options}
        content["volumes"] = content.get("volumes", {}) | {"store": store}
    return content


def _instance(cluster: Cluster, launch: PoolLaunch, gpus: range) -> dict[str, Any]:
    command = [text.replace("$", "$$") for text in launch.command]
    if launch.side_channel:
        # The handshake listens on an address, which a container learns as it starts.
        script = 'export VLLM_NIXL_SIDE_CHANNEL_HOST="$$(hostname -i)"; exec "$$@"'
        command = ["/bin/sh", "-c", script, "sh", *command]
    volumes = _models(cluster)
    if cluster.store_gib is not None:
        volumes.append({"type": "volume", "source": "store", "target": STORE_PLACE})
    service: dict[str, Any] = {
        "image": cluster.image,
        "entrypoint": command,
        "environment": {
            **launch.environment,
            "VLLM_API_KEY": _required("VLLM_API_KEY"),
            **_hub(cluster),
        },
        "expose": [str(HTTP_PORT)],
        "volumes": volumes,
        "shm_size": "8gb",
        "healthcheck": _health("/health", start_period="20m"),
        "restart": "unless-stopped",
        "stop_grace_period": f"{2 * DRAIN_S}s",
    }
    if gpus:
        device = {
            "driver": "nvidia",
            "device_ids": [str(index) for index in gpus],
            "capabilities": ["gpu"],
        }
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return service


def _names(pool: Pool) -> list[str]:
    return [f"{pool.name}-{index}" for index in range(pool.replicas)]


def _hub(cluster: Cluster) -> dict[str, str]:
    return {HUB_TOKEN: f"${{{HUB_TOKEN}:-}}", "HF_HOME": HUB_PLACE} if cluster.from_hub else {}


def _models(cluster: Cluster) -> list[dict[str, Any]]:
    hub = {"type": "volume", "source": "hub", "target": HUB_PLACE}
    return ([hub] if cluster.from_hub else []) + [
        {
            "type": "bind",
            "source": place,
            "target": f"{cluster.model_root}/{name}",
            "read_only": True,
            # A place that is missing is an error, not an empty folder made by root.
            "bind": {"create_host_path": False},
        }
        for name, place in cluster.models.items()
        if place
    ]


def _required(name: str) -> str:
    return f"${{{name}:?set {name} in the environment or in .env}}"


def _health(path: str, *, start_period: str) -> dict[str, Any]:
    address = f"http://127.0.0.1:{HTTP_PORT}{path}"
    script = f"import urllib.request as r; r.urlopen('{address}', timeout=4)"
    return {
        "test": ["CMD", "python3", "-c", script],
        "interval": "10s",
        "timeout": "5s",
        "retries": 6,
        "start_period": start_period,
    }
