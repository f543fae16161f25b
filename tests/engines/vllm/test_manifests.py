"""Compose file and Kubernetes manifests: valid by their published schemas, and wired together."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.engines.vllm.deployments import full_decoder, lora_decoder

from prefillshare_train.engines.vllm.manifests.autoscaling import ADAPTER_RULE
from prefillshare_train.engines.vllm.manifests.cluster import Cluster, PoolLaunch
from prefillshare_train.engines.vllm.manifests.compose import compose_file, service_addresses
from prefillshare_train.engines.vllm.manifests.kubernetes import (
    kubernetes_objects,
    kubernetes_text,
    replica_addresses,
)
from prefillshare_train.engines.vllm.topology import Topology, read_decoder

KUBERNETES = ("1.29", "1.37")


def cluster_of(tmp_path: Path, **values: Any) -> Cluster:
    decoders = (
        read_decoder("code", full_decoder(tmp_path / "code")),
        read_decoder("tools", lora_decoder(tmp_path / "tools")),
    )
    topology = Topology(
        base=str(tmp_path / "base"),
        decoders=decoders,
        route="nixl",
        prefill_replicas=4,
        lora_together=False,
    )
    launches = tuple(
        PoolLaunch(pool, ("python3", "-m", "x", "--a=$b"), {"K": "v"}, pool.role == "prefill")
        for pool in topology.pools
    )
    settings: dict[str, Any] = {
        "launches": launches,
        "image": "an/image:1",
        "model_root": "/models",
        "models": {"base": str(tmp_path / "base"), "code": str(tmp_path / "code"), "hub": ""},
        "gpus": 1,
        "cpus": 8,
        "memory_gib": 64,
        "store_gib": None,
        "max_replicas": 6,
        "namespace": "prefillshare",
        "monitoring_namespace": "observed",
    }
    return Cluster(**(settings | values))


def check_compose(content: Any) -> None:
    vendored = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = yaml.safe_load(vendored.read_text())
    jsonschema.validators.validator_for(schema)(schema).validate(content)


@pytest.mark.parametrize("store_gib", [None, 20])
@pytest.mark.parametrize("gpus", [0, 2])
def test_the_compose_file_is_valid(tmp_path: Path, gpus: int, store_gib: int | None) -> None:
    content = compose_file(cluster_of(tmp_path, gpus=gpus, store_gib=store_gib))
    check_compose(yaml.safe_load(yaml.safe_dump(content)))
    broken = copy.deepcopy(content)
    broken["services"]["router"]["port"] = "8000"
    with pytest.raises(jsonschema.ValidationError):
        check_compose(broken)


def test_each_replica_is_a_service_with_gpus_of_its_own(tmp_path: Path) -> None:
    services = compose_file(cluster_of(tmp_path, gpus=2))["services"]
    instances = [*(f"prefill-{i}" for i in range(4)), "decode-code-0", "decode-tools-0"]
    assert [*services] == [*instances, "router"]
    given = [
        device
        for name in instances
        for device in services[name]["deploy"]["resources"]["reservations"]["devices"][0][
            "device_ids"
        ]
    ]
    assert given == [str(index) for index in range(12)]
    assert set(services["router"]["depends_on"]) == set(instances)


def test_compose_leaves_arguments_as_they_are_and_finds_the_side_channel(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path)
    services = compose_file(cluster)["services"]
    assert services["decode-code-0"]["entrypoint"] == ["python3", "-m", "x", "--a=$$b"]
    assert services["prefill-0"]["entrypoint"][-4:] == ["python3", "-m", "x", "--a=$$b"]
    assert "$$(hostname -i)" in services["prefill-0"]["entrypoint"][2]
    assert service_addresses(cluster.launches[0].pool)[3] == "http://prefill-3:8000"
    mounted = {v["target"]: v["source"] for v in services["prefill-0"]["volumes"]}
    assert mounted == {
        "/models/base": f"{tmp_path}/base",
        "/models/code": f"{tmp_path}/code",
        "/var/lib/prefillshare/hub": "hub",
    }


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("store_gib", [None, 20])
@pytest.mark.parametrize("gpus", [0, 1])
def test_kubernetes_objects_are_valid(
    tmp_path: Path, gpus: int, store_gib: int | None, version: str
) -> None:
    objects = kubernetes_objects(
        cluster_of(tmp_path, gpus=gpus, store_gib=store_gib), {"prefill": ["http://a:1"]}
    )
    for value in yaml.safe_load_all(yaml.safe_dump_all(objects)):
        kubernetes_validate.validate(value, version, strict=True)
    broken = copy.deepcopy(objects[-1])
    broken["spec"]["podSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, version, strict=True)


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, dict[str, Any]]:
    return {value["metadata"]["name"]: value for value in objects if value["kind"] == kind}


def test_the_router_s_addresses_are_those_of_the_pods(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path)
    objects = kubernetes_objects(cluster, {})
    pods = of_kind(objects, "StatefulSet")
    services = of_kind(objects, "Service")
    assert [*pods] == ["prefill", "decode-code", "decode-tools"]
    for name, value in pods.items():
        spec = value["spec"]
        assert services[spec["serviceName"]]["spec"]["clusterIP"] == "None"
        selected = services[spec["serviceName"]]["spec"]["selector"]
        assert selected == spec["selector"]["matchLabels"]
        assert selected.items() <= spec["template"]["metadata"]["labels"].items()
        port = spec["template"]["spec"]["containers"][0]["ports"][0]["containerPort"]
        pool = next(one.pool for one in cluster.launches if one.pool.name == name)
        addresses = replica_addresses(pool, 2)
        assert addresses[1] == f"http://{name}-1.{spec['serviceName']}:{port}"


def test_pools_scale_between_their_size_and_the_largest(tmp_path: Path) -> None:
    scalers = of_kind(kubernetes_objects(cluster_of(tmp_path), {}), "HorizontalPodAutoscaler")
    assert {
        name: (value["spec"]["minReplicas"], value["spec"]["maxReplicas"])
        for name, value in scalers.items()
    } == {"prefill": (4, 6), "decode-code": (1, 6), "decode-tools": (1, 6)}


def test_instances_are_reached_by_their_own_kind_only(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path)
    (policy,) = of_kind(kubernetes_objects(cluster, {}), "NetworkPolicy").values()
    (selected,) = policy["spec"]["podSelector"]["matchExpressions"]
    assert selected["values"] == [launch.pool.name for launch in cluster.launches]
    own, monitoring = policy["spec"]["ingress"]
    pods = of_kind(kubernetes_objects(cluster, {}), "StatefulSet")
    (peer,) = own["from"]
    assert all(
        peer["podSelector"]["matchLabels"].items()
        <= value["spec"]["template"]["metadata"]["labels"].items()
        for value in pods.values()
    )
    assert monitoring == {
        "from": [
            {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "observed"}}}
        ],
        "ports": [{"protocol": "TCP", "port": 8000}],
    }


def test_the_adapter_s_rule_gives_the_names_that_the_autoscalers_ask_for(tmp_path: Path) -> None:
    cluster = cluster_of(tmp_path)
    (rule,) = yaml.safe_load(ADAPTER_RULE)
    (seen,) = re.findall(r'=~"(.*)"', rule["seriesQuery"])
    named = re.compile(rule["name"]["matches"])
    given = {
        named.sub(r"vllm_\1", metric)
        for metric in ("vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        if re.search(seen, metric)
    }
    assert rule["name"]["as"] == "vllm_${1}"
    scalers = of_kind(kubernetes_objects(cluster, {}), "HorizontalPodAutoscaler")
    asked = {value["spec"]["metrics"][0]["pods"]["metric"]["name"] for value in scalers.values()}
    assert asked == given
    assert "# - seriesQuery" in kubernetes_text([], cluster).replace("#   -", "# -")


@pytest.mark.parametrize("from_hub", [True, False])
def test_models_from_the_hub_get_a_token_and_a_place(tmp_path: Path, from_hub: bool) -> None:
    models = {"base": "" if from_hub else "/here/base", "code": "/here/code"}
    cluster = cluster_of(tmp_path, models=models)
    objects = kubernetes_objects(cluster, {})
    owners = [*of_kind(objects, "StatefulSet").values(), *of_kind(objects, "Deployment").values()]
    for owner in owners:
        spec = owner["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        variables = {one["name"]: one for one in container["env"]}
        mounts = {one["name"] for one in container["volumeMounts"]}
        assert mounts == {one["name"] for one in spec["volumes"]}
        assert ("hub" in mounts) is from_hub
        assert ("HF_TOKEN" in variables) is from_hub
        if from_hub:
            assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
    content = compose_file(cluster)
    assert ("volumes" in content) is from_hub
    for service in content["services"].values():
        assert ("HF_TOKEN" in service["environment"]) is from_hub
    head = kubernetes_text([], cluster)
    assert ("base, from" in head) is not from_hub
    assert "code, from /here/code" in head


def test_a_store_that_nobody_shares_is_each_pod_s_own(tmp_path: Path) -> None:
    shared = cluster_of(tmp_path, store_gib=20)
    together = Topology(
        base=str(tmp_path / "base"),
        decoders=(read_decoder("tools", tmp_path / "tools"),),
        route="lora",
        prefill_replicas=2,
    )
    launches = tuple(PoolLaunch(pool, ("python3",), {}) for pool in together.pools)
    for cluster, claimed in ((shared, True), (replace(shared, launches=launches), False)):
        objects = kubernetes_objects(cluster, {})
        assert ("prefillshare-store" in of_kind(objects, "PersistentVolumeClaim")) is claimed
        for pods in of_kind(objects, "StatefulSet").values():
            volumes = {one["name"]: one for one in pods["spec"]["template"]["spec"]["volumes"]}
            assert ("persistentVolumeClaim" in volumes["store"]) is claimed
            assert ("emptyDir" in volumes["store"]) is not claimed


def test_only_the_prefill_announces_a_side_channel(tmp_path: Path) -> None:
    pods = of_kind(kubernetes_objects(cluster_of(tmp_path), {}), "StatefulSet")
    announced = {
        name: "VLLM_NIXL_SIDE_CHANNEL_HOST"
        in [v["name"] for v in value["spec"]["template"]["spec"]["containers"][0]["env"]]
        for name, value in pods.items()
    }
    assert announced == {"prefill": True, "decode-code": False, "decode-tools": False}
