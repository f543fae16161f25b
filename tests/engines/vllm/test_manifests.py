"""Compose file and Kubernetes manifests: valid by their published schemas, and wired together."""

from __future__ import annotations

import copy
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.engines.vllm.deployments import full_decoder, lora_decoder

from prefillshare_train.engines.vllm.manifests.cluster import Cluster, PoolLaunch
from prefillshare_train.engines.vllm.manifests.compose import compose_file, service_addresses
from prefillshare_train.engines.vllm.manifests.kubernetes import (
    kubernetes_objects,
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
    assert mounted == {"/models/base": f"{tmp_path}/base", "/models/code": f"{tmp_path}/code"}


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


def test_only_the_prefill_announces_a_side_channel(tmp_path: Path) -> None:
    pods = of_kind(kubernetes_objects(cluster_of(tmp_path), {}), "StatefulSet")
    announced = {
        name: "VLLM_NIXL_SIDE_CHANNEL_HOST"
        in [v["name"] for v in value["spec"]["template"]["spec"]["containers"][0]["env"]]
        for name, value in pods.items()
    }
    assert announced == {"prefill": True, "decode-code": False, "decode-tools": False}
