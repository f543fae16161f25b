"""Kubernetes objects: a StatefulSet a pool, the router, and what they need.

Instances have names of their own (`prefill-0.prefill`), because the router sends a session to the
replica that holds its prefix and a load balancer in between would undo that. The router is told
every name up to the largest size of a pool; those that are not there fail its health checks and get
nothing, so that a pool may grow and shrink without a new configuration.
"""

from __future__ import annotations

from typing import Any

import yaml

from prefillshare_train.engines.vllm.manifests.autoscaling import ADAPTER_RULE, scaler
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

Object = dict[str, Any]

_PART_OF = {"app.kubernetes.io/part-of": "prefillshare"}
_SECRET = "prefillshare-keys"
_MODELS = "prefillshare-models"
_STORE = "prefillshare-store"
_CONFIG = "prefillshare-router"
# A large model takes minutes to load; a pod that has not by then is started anew.
_START_TRIES, _START_PERIOD_S = 120, 10

_HEAD = """\
# kubectl apply -f kubernetes.yaml, after
#   kubectl create namespace {namespace}
#   kubectl -n {namespace} create secret generic prefillshare-keys \\
#     --from-literal=PREFILLSHARE_API_KEY=... --from-literal=VLLM_API_KEY=...{token}
# The claim prefillshare-models must hold these folders, seen by the containers under {model_root}:
{models}
# The autoscalers read vLLM's metrics through prometheus-adapter, by the rule below; without it
# they do nothing. Prometheus is let in from the namespace {monitoring}.
{rule}"""


def replica_addresses(pool: Pool, replicas: int) -> tuple[str, ...]:
    """Addresses of a pool's instances, by which the router finds them."""
    return tuple(f"http://{pool.name}-{index}.{pool.name}:{HTTP_PORT}" for index in range(replicas))


def kubernetes_objects(cluster: Cluster, router: dict[str, Any]) -> list[Object]:
    """Every object, in an order in which they can be applied.

    Args:
        router: options of the router, addresses included.
    """
    objects: list[Object] = [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": cluster.namespace, "labels": dict(_PART_OF)},
        },
        _claim(cluster, _MODELS, "ReadWriteMany", "200Gi"),
    ]
    if cluster.store_gib is not None and cluster.shares_store:
        objects.append(_claim(cluster, _STORE, "ReadWriteMany", _store_size(cluster.store_gib)))
    objects.append(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _metadata(cluster, _CONFIG, "router"),
            "data": {"router.yaml": yaml.safe_dump(router, sort_keys=False)},
        }
    )
    for launch in cluster.launches:
        objects += _pool_objects(cluster, launch)
    objects += _router_objects(cluster)
    objects.append(_network_policy(cluster))
    return objects


def kubernetes_text(objects: list[Object], cluster: Cluster) -> str:
    """The file's content."""
    held = [f"#   {name}, from {place}" for name, place in cluster.models.items() if place]
    head = _HEAD.format(
        namespace=cluster.namespace,
        model_root=cluster.model_root,
        monitoring=cluster.monitoring_namespace,
        models="\n".join(held),
        token=f" \\\n#     --from-literal={HUB_TOKEN}=..." if cluster.from_hub else "",
        rule="".join(f"#   {line}\n" for line in ADAPTER_RULE.splitlines()),
    )
    return head + yaml.safe_dump_all(objects, sort_keys=False)


def _pool_objects(cluster: Cluster, launch: PoolLaunch) -> list[Object]:
    pool = launch.pool
    labels = _labels(pool.name)
    headless = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(cluster, pool.name, pool.name),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the router checks health itself
            "selector": labels,
            "ports": [{"name": "http", "port": HTTP_PORT}],
        },
    }
    pods = {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _metadata(cluster, pool.name, pool.name),
        "spec": {
            "serviceName": pool.name,
            "replicas": pool.replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {
                    "labels": {**labels, **_PART_OF},
                    "annotations": _scraped(),
                },
                "spec": {
                    "terminationGracePeriodSeconds": 2 * DRAIN_S,
                    "containers": [_instance(cluster, launch)],
                    "volumes": _instance_volumes(cluster),
                },
            },
        },
    }
    grown = scaler(pool, _metadata(cluster, pool.name, pool.name), cluster.max_replicas)
    return [headless, pods, grown]


def _instance(cluster: Cluster, launch: PoolLaunch) -> Object:
    environment: list[Object] = [
        {"name": name, "value": value} for name, value in launch.environment.items()
    ]
    environment += [_from_secret("VLLM_API_KEY"), *_hub(cluster)]
    if launch.side_channel:
        address = {"fieldRef": {"fieldPath": "status.podIP"}}
        environment.append({"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": address})
    sizes: Object = {"cpu": str(cluster.cpus), "memory": f"{cluster.memory_gib}Gi"}
    if cluster.gpus:
        sizes["nvidia.com/gpu"] = cluster.gpus
    mounts = [
        {"name": "models", "mountPath": cluster.model_root, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if cluster.store_gib is not None:
        mounts.append({"name": "store", "mountPath": STORE_PLACE})
    if cluster.from_hub:
        mounts.append({"name": "hub", "mountPath": HUB_PLACE})
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    return {
        "name": "vllm",
        "image": cluster.image,
        "command": list(launch.command),
        "env": environment,
        "ports": [{"name": "http", "containerPort": HTTP_PORT}],
        "startupProbe": {
            **health,
            "periodSeconds": _START_PERIOD_S,
            "failureThreshold": _START_TRIES,
        },
        "readinessProbe": {**health, "periodSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 10, "failureThreshold": 6},
        "resources": {"requests": dict(sizes), "limits": dict(sizes)},
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }


def _instance_volumes(cluster: Cluster) -> list[Object]:
    volumes: list[Object] = [
        {"name": "models", "persistentVolumeClaim": {"claimName": _MODELS, "readOnly": True}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},
    ]
    if cluster.store_gib is not None:
        store: Object = {"persistentVolumeClaim": {"claimName": _STORE}}
        if not cluster.shares_store:
            store = {"emptyDir": {"sizeLimit": _store_size(cluster.store_gib)}}
        volumes.append({"name": "store", **store})
    if cluster.from_hub:
        volumes.append({"name": "hub", "emptyDir": {}})
    return volumes


def _store_size(gib: int) -> str:
    """With room for blocks that are being written beside the budget."""
    return f"{gib + max(1, gib // 10)}Gi"


def _hub(cluster: Cluster) -> list[Object]:
    if not cluster.from_hub:
        return []
    key = {"name": _SECRET, "key": HUB_TOKEN, "optional": True}
    return [
        {"name": HUB_TOKEN, "valueFrom": {"secretKeyRef": key}},
        {"name": "HF_HOME", "value": HUB_PLACE},
    ]


def _router_objects(cluster: Cluster) -> list[Object]:
    labels = _labels("router")
    probe = {"timeoutSeconds": 5, "periodSeconds": 5}
    container = {
        "name": "router",
        "image": cluster.image,
        "command": list(ROUTER_COMMAND),
        "env": [*map(_from_secret, KEYS), *_hub(cluster)],
        "ports": [{"name": "http", "containerPort": HTTP_PORT}],
        "startupProbe": {
            "httpGet": {"path": "/health", "port": "http"},
            "periodSeconds": 5,
            "failureThreshold": 60,
        },
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, **probe},
        "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, **probe},
        "resources": {
            "requests": {"cpu": "2", "memory": "4Gi"},
            "limits": {"memory": "4Gi"},
        },
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_PLACE, "subPath": "router.yaml"},
            {"name": "models", "mountPath": cluster.model_root, "readOnly": True},
            *([{"name": "hub", "mountPath": HUB_PLACE}] if cluster.from_hub else []),
        ],
    }
    models = {"claimName": _MODELS, "readOnly": True}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(cluster, "router", "router"),
        "spec": {
            # One: which replica holds which prefix is known in its memory.
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {
                    "labels": {**labels, **_PART_OF},
                    "annotations": _scraped(),
                },
                "spec": {
                    "terminationGracePeriodSeconds": 2 * DRAIN_S,
                    "containers": [container],
                    "volumes": [
                        {"name": "config", "configMap": {"name": _CONFIG}},
                        {"name": "models", "persistentVolumeClaim": models},
                        *([{"name": "hub", "emptyDir": {}}] if cluster.from_hub else []),
                    ],
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(cluster, "router", "router"),
        "spec": {
            "selector": labels,
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
        },
    }
    return [deployment, service]


def _network_policy(cluster: Cluster) -> Object:
    """Instances answer each other, the router and Prometheus: NIXL's handshake asks for no key."""
    monitoring = {"kubernetes.io/metadata.name": cluster.monitoring_namespace}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(cluster, "prefillshare-instances", "instances"),
        "spec": {
            "podSelector": {
                "matchExpressions": [
                    {
                        "key": "app.kubernetes.io/component",
                        "operator": "In",
                        "values": [launch.pool.name for launch in cluster.launches],
                    }
                ]
            },
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": dict(_PART_OF)}}]},
                {
                    "from": [{"namespaceSelector": {"matchLabels": monitoring}}],
                    "ports": [{"protocol": "TCP", "port": HTTP_PORT}],
                },
            ],
        },
    }


def _claim(cluster: Cluster, name: str, mode: str, size: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(cluster, name, "storage"),
        "spec": {"accessModes": [mode], "resources": {"requests": {"storage": size}}},
    }


def _from_secret(name: str) -> Object:
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": _SECRET, "key": name}}}


def _metadata(cluster: Cluster, name: str, component: str) -> Object:
    labels = {**_labels(component), **_PART_OF}
    return {"name": name, "namespace": cluster.namespace, "labels": labels}


def _labels(component: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "prefillshare", "app.kubernetes.io/component": component}


def _scraped() -> dict[str, str]:
    return {"prometheus.io/scrape": "true", "prometheus.io/port": str(HTTP_PORT)}
