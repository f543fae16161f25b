"""`prefillshare vllm plan`: what a cluster needs to run a deployment, as files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.fingerprint import base_config, base_fingerprint
from prefillshare_train.engines.vllm.instance import InstanceOptions
from prefillshare_train.engines.vllm.launches import (
    NIXL_PORTS_ABOVE,
    InstanceSettings,
    Place,
    check_contracts,
    common_contract,
    instance_options,
    router_options,
)
from prefillshare_train.engines.vllm.manifests.cluster import (
    DRAIN_S,
    HTTP_PORT,
    STORE_PLACE,
    Cluster,
    PoolLaunch,
)
from prefillshare_train.engines.vllm.manifests.compose import (
    COMPOSE_HEAD,
    ROUTER_FILE,
    compose_file,
    service_addresses,
)
from prefillshare_train.engines.vllm.manifests.dockerfile import dockerfile
from prefillshare_train.engines.vllm.manifests.kubernetes import (
    kubernetes_objects,
    kubernetes_text,
    replica_addresses,
)
from prefillshare_train.engines.vllm.manifests.script import (
    LISTEN,
    Process,
    commands_script,
    host_mark,
)
from prefillshare_train.engines.vllm.plain_adapter import loadable_folder
from prefillshare_train.engines.vllm.topology import (
    BASE_NAME,
    Decoder,
    Pool,
    Topology,
    host_label,
)
from prefillshare_train.engines.vllm.vllm_python import TESTED_VLLM

NIXL_PORT = 5600
FIRST_PORT = 8100
UPSTREAM_IMAGE = f"vllm/vllm-openai:v{TESTED_VLLM[0]}"
_FILES = ("commands.sh", "docker-compose.yaml", ROUTER_FILE, "kubernetes.yaml", "Dockerfile")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the files say beside the deployment itself.

    Attributes:
        out: folder to write into.
        image: with vLLM and this package; what the Dockerfile builds.
        from_image: what the Dockerfile starts from.
        model_root: folder in the containers under which models lie.
        gpus, cpus, memory_gib: of each instance.
        max_replicas: to which autoscaling may take a pool.
        namespace: of Kubernetes.
        monitoring_namespace: where its Prometheus runs.
        force: whether files that are there already are replaced.
    """

    out: Path
    image: str = "prefillshare-vllm:latest"
    from_image: str = UPSTREAM_IMAGE
    model_root: str = "/models"
    gpus: int = 1
    cpus: int = 8
    memory_gib: int = 64
    max_replicas: int = 8
    namespace: str = "prefillshare"
    monitoring_namespace: str = "monitoring"
    force: bool = False


def write_plan(
    topology: Topology,
    settings: InstanceSettings,
    options: PlanOptions,
    *,
    tell: Callable[[str], None],
) -> list[Path]:
    """Write the files of a plan.

    The base need not be on this machine; where it is, decoders are checked against it, and else
    against each other.

    Args:
        tell: takes lines about what was not checked.

    Returns:
        The files.

    Raises:
        ContractError: a decoder does not fit the base or the route.
        VllmError: the decoders do not fit each other, or the folder cannot be written to.
    """
    fingerprint, dtype = common_contract(topology, settings.dtype)
    config = None
    if Path(topology.base).is_dir():
        fingerprint, config = base_fingerprint(topology.base), base_config(topology.base)
    else:
        tell(f"{topology.base} is no folder here: its weights are checked as the instances start")
    check_contracts(topology, base_fingerprint=fingerprint, kv_dtype=dtype, config=config)
    taken = [name for name in _FILES if (options.out / name).exists()]
    if taken and not options.force:
        raise VllmError(f"{options.out} has {taken[0]} already: choose another --out, or --force")
    build = _Builder(topology, settings, options, fingerprint, dtype)
    texts = build.texts()
    for decoder in topology.decoders:
        if decoder.invocation_tokens:
            place = loadable_folder(decoder, options.out / "adapters")
            tell(f"decoder {decoder.name} has the aLoRA format: vLLM loads the copy in {place}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            beside = options.out / f".{name}.{os.getpid()}"
            beside.write_text(text)
            beside.chmod(0o755 if name.endswith(".sh") else 0o644)
            beside.replace(options.out / name)
    except OSError as error:
        raise VllmError(f"{options.out} cannot be written to: {error}") from None
    return [options.out / name for name in texts]


class _Builder:
    def __init__(
        self,
        topology: Topology,
        settings: InstanceSettings,
        options: PlanOptions,
        fingerprint: str,
        dtype: str,
    ) -> None:
        self._topology = topology
        self._settings = settings
        self._options = options
        self._fingerprint = fingerprint
        self._dtype = dtype

    def texts(self) -> dict[str, str]:
        """Name to content of every file."""
        cluster = self._cluster()
        server = {"host": "0.0.0.0", "port": HTTP_PORT}
        contained = self._contained_folders()
        pools = self._topology.pools
        compose = {pool.name: service_addresses(pool) for pool in pools}
        highest = self._options.max_replicas
        pods = {p.name: replica_addresses(p, max(p.replicas, highest)) for p in pools}
        objects = kubernetes_objects(cluster, self._router(pods, contained, server))
        return {
            "commands.sh": self._commands(),
            "docker-compose.yaml": COMPOSE_HEAD + _yaml(compose_file(cluster)),
            ROUTER_FILE: _yaml(self._router(compose, contained, server)),
            "kubernetes.yaml": kubernetes_text(objects, cluster),
            "Dockerfile": dockerfile(
                self._options.image, self._options.from_image, version("prefillshare-train")
            ),
        }

    def _cluster(self) -> Cluster:
        options = self._options
        nixl = self._topology.route == "nixl"
        launches = []
        for pool in self._topology.pools:
            place = Place(
                host="0.0.0.0", port=HTTP_PORT, nixl_host="", nixl_port=NIXL_PORT if nixl else None
            )
            instance = self._instance(pool, place, self._contained_folders(), STORE_PLACE)
            variables = instance.variables()
            # The address is the container's own, which it learns as it starts.
            variables.pop("VLLM_NIXL_SIDE_CHANNEL_HOST", None)
            command = tuple(instance.command("python3"))
            launches.append(PoolLaunch(pool, command, variables, side_channel=nixl))
        return Cluster(
            launches=tuple(launches),
            image=options.image,
            model_root=options.model_root,
            models=self._models(),
            gpus=0 if self._settings.cpu else options.gpus,
            cpus=options.cpus,
            memory_gib=options.memory_gib,
            store_gib=None if nixl else max(1, round(self._settings.store_gib)),
            max_replicas=options.max_replicas,
            namespace=options.namespace,
            monitoring_namespace=options.monitoring_namespace,
        )

    def _commands(self) -> str:
        """One process a line of `case`, by the folders of this machine."""
        processes: list[Process] = []
        addresses: dict[str, list[str]] = {}
        here = self._models()
        folders = here | {BASE_NAME: here[BASE_NAME] or self._topology.base}
        for pool in self._topology.pools:
            for index in range(pool.replicas):
                name = f"{pool.name}-{index}"
                variable = f"{name.upper().replace('-', '_')}_HOST"
                host = host_mark(variable)
                port = FIRST_PORT + len(processes)
                nixl = port + NIXL_PORTS_ABOVE if self._topology.route == "nixl" else None
                place = Place(port=port, host=LISTEN, nixl_port=nixl, nixl_host=host)
                instance = self._instance(pool, place, folders, self._settings.store)
                processes.append(Process(name, variable, instance))
                addresses.setdefault(pool.name, []).append(f"http://{host}:{port}")
        router = router_options(
            self._topology,
            self._settings,
            addresses,
            folders,
            {"host": "127.0.0.1", "port": HTTP_PORT},
        )
        return commands_script(processes, _yaml(router))

    def _instance(
        self, pool: Pool, place: Place, folders: Mapping[str, str], store: str
    ) -> InstanceOptions:
        made = instance_options(
            self._topology,
            pool,
            replace(self._settings, store=store),
            place,
            base_fingerprint=self._fingerprint,
            dtype=self._dtype,
            folders=folders,
        )
        # A rollout or an autoscaler ends instances at any time.
        return replace(made, shutdown_timeout_s=DRAIN_S)

    def _router(
        self,
        addresses: Mapping[str, Sequence[str]],
        folders: Mapping[str, str],
        server: Mapping[str, Any],
    ) -> dict[str, Any]:
        return router_options(self._topology, self._settings, addresses, folders, server)

    def _contained_folders(self) -> dict[str, str]:
        """Where containers find models: mounted ones under the root, others by their hub id."""
        places = self._models()
        root = self._options.model_root.rstrip("/")
        folders = {name: f"{root}/{name}" for name in places}
        if not places[BASE_NAME]:
            folders[BASE_NAME] = self._topology.base
        return folders

    def _models(self) -> dict[str, str]:
        base = Path(self._topology.base)
        # An absolute path is a place, also one that only the cluster's machines have.
        here = str(base.absolute()) if base.is_dir() or base.is_absolute() else ""
        return {BASE_NAME: here} | {
            decoder.name: str(self._place_here(decoder)) for decoder in self._topology.decoders
        }

    def _place_here(self, decoder: Decoder) -> Path:
        if not decoder.invocation_tokens:
            return decoder.folder.absolute()
        return self._options.out.absolute() / "adapters" / host_label(decoder.name)


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False)
