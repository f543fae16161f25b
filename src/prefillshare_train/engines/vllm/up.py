"""`prefillshare vllm up`: a deployment on one machine, from its checks to its last process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import yaml

from prefillshare_train.engines.vllm.claims import claimed
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
from prefillshare_train.engines.vllm.plain_adapter import loadable_folder
from prefillshare_train.engines.vllm.process import ServerProcess
from prefillshare_train.engines.vllm.router.config import API_KEY_VARIABLE, RouterConfig
from prefillshare_train.engines.vllm.supervisor import RestartPolicy, Supervisor
from prefillshare_train.engines.vllm.topology import BASE_NAME, Topology
from prefillshare_train.serving.server.config import ServerConfig

_LOOPBACK = "127.0.0.1"
_AFTER_DRAIN_S = 10.0
_DEVICES = Path("/dev")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class UpOptions:
    """Where and how a deployment runs on this machine.

    Attributes:
        python: the interpreter that has vLLM.
        run_dir: folder of logs, the router's file and copies of adapters.
        server: what clients meet: the router's address, key, limits.
        instance_port: first of the instances' ports.
        devices: by an instance's name, the CPU cores (CPU builds) or GPUs that it gets; the others
            share evenly what there is.
        ready_timeout_s: for all instances together.
        restarts: how often a process that ended may be started again.
    """

    python: Path
    run_dir: Path
    server: ServerConfig
    instance_port: int = 8100
    devices: Mapping[str, str] = field(default_factory=dict)
    ready_timeout_s: float = 600.0
    restarts: RestartPolicy = field(default_factory=RestartPolicy)


class _Router(ServerProcess):
    """Ready when it sees the instances; gets the time that its running responses may take."""

    def __init__(self, *args: Any, drain_timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._drain_timeout_s = drain_timeout_s
        self._missing = ""

    def is_ready(self) -> bool:
        if not super().is_ready():
            return False
        try:
            answer = httpx.get(f"{self.url}/ready", timeout=5.0, trust_env=False)
        except httpx.HTTPError:
            return False
        self._missing = "" if answer.is_success else f"\n  /ready answers: {answer.text}"
        return answer.is_success

    def last_lines(self, count: int = 25) -> str:
        return super().last_lines(count) + self._missing

    def stop(self, grace_s: float | None = None) -> None:
        super().stop(self._drain_timeout_s + _AFTER_DRAIN_S if grace_s is None else grace_s)


def run_up(
    topology: Topology, settings: InstanceSettings, options: UpOptions, *, tell: Tell
) -> None:
    """Check, start and supervise a deployment until SIGINT, SIGTERM or SIGHUP.

    Args:
        tell: takes lines of progress.

    Raises:
        ContractError: a decoder does not fit the base or the route; nothing was started.
        VllmError: something else does not fit and nothing was started; or a process ended, and
            nothing is left running.
    """
    stopping = threading.Event()
    with _stop_on_signals(stopping):
        fingerprint, dtype = common_contract(topology, settings.dtype)
        tell(f"checking {len(topology.decoders)} decoders against the base {topology.base}")
        found = base_fingerprint(topology.base)
        config = base_config(topology.base)
        check_contracts(topology, base_fingerprint=found, kv_dtype=dtype, config=config)
        names = [f"{p.name}-{i}" for p in topology.pools for i in range(p.replicas)]
        ports = _ports(topology, options, len(names))
        about = {"logs": str(options.run_dir.absolute()), "base": topology.base}
        with claimed(_LOOPBACK, ports, about):
            instances = _instances(topology, settings, options, names, fingerprint, dtype)
            router = _router(topology, settings, options, instances)
            started = [
                ServerProcess(
                    name,
                    one.command(options.python),
                    variables=one.variables(),
                    url=one.url,
                    log=options.run_dir / f"{name}.log",
                )
                for name, one in instances.items()
            ]
            supervisor = Supervisor(
                [started, [router]],
                tell=tell,
                stopping=stopping,
                ready_timeout_s=options.ready_timeout_s,
                restarts=options.restarts,
            )
            with supervisor.running():
                if not stopping.is_set():
                    served = ", ".join(decoder.name for decoder in topology.decoders)
                    tell(f"serving {served} at {router.url}/v1 (Ctrl-C stops)")
                supervisor.watch()
                tell("stopping: running responses may finish first")
        tell("stopped")


def share_devices(available: Sequence[int | str], count: int) -> list[str]:
    """Cores or GPUs of each of `count` instances: neighbours, as evenly as they go.

    Where there are fewer than instances, several get the same one.
    """
    if not available:
        return [""] * count
    shares = []
    for index in range(count):
        begin = index * len(available) // count
        end = max(begin + 1, (index + 1) * len(available) // count)
        shares.append(",".join(map(str, available[begin:end])))
    return shares


def _instances(
    topology: Topology,
    settings: InstanceSettings,
    options: UpOptions,
    names: Sequence[str],
    fingerprint: str,
    dtype: str,
) -> dict[str, InstanceOptions]:
    folders = {BASE_NAME: topology.base}
    for decoder in topology.decoders:
        folder = loadable_folder(decoder, options.run_dir / "adapters")
        folders[decoder.name] = str(folder.absolute())
    devices = _devices(settings, options, names)
    instances = {}
    pools = [pool for pool in topology.pools for _ in range(pool.replicas)]
    for index, (name, pool) in enumerate(zip(names, pools, strict=True)):
        port = options.instance_port + index
        given = devices[name]
        gpus = {"CUDA_VISIBLE_DEVICES": given} if given and not settings.cpu else {}
        place = Place(
            port=port,
            nixl_port=port + NIXL_PORTS_ABOVE if topology.route == "nixl" else None,
            cores=given if given and settings.cpu else None,
            environment=gpus,
        )
        instances[name] = instance_options(
            topology,
            pool,
            settings,
            place,
            base_fingerprint=fingerprint,
            dtype=dtype,
            folders=folders,
        )
    return instances


def _devices(
    settings: InstanceSettings, options: UpOptions, names: Sequence[str]
) -> dict[str, str]:
    if unknown := sorted(options.devices.keys() - set(names)):
        raise VllmError(
            f"--devices {unknown[0]}: there is no such instance; there are {', '.join(names)}"
        )
    if settings.cpu:
        shares = share_devices(sorted(os.sched_getaffinity(0)), len(names))
    else:
        shares = share_devices(_visible_gpus(), len(names))
    return dict(zip(names, shares, strict=True)) | dict(options.devices)


def _visible_gpus() -> list[str]:
    """What this process may use: indices, or the UUIDs that a batch system gave it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip()]
    # CUDA counts from 0 what a container was given, whatever its devices are called.
    return [str(index) for index in range(len(list(_DEVICES.glob("nvidia[0-9]*"))))]


def _ports(topology: Topology, options: UpOptions, count: int) -> list[int]:
    ports = [options.server.port, *range(options.instance_port, options.instance_port + count)]
    if topology.route == "nixl":
        ports += [port + NIXL_PORTS_ABOVE for port in ports[1:]]
    if len(set(ports)) < len(ports) or not all(0 < port < 1 << 16 for port in ports):
        raise VllmError(
            f"--port {options.server.port} and --instance-port {options.instance_port} do not go "
            f"together: the ports would be {', '.join(map(str, ports))}"
        )
    return ports


def _router(
    topology: Topology,
    settings: InstanceSettings,
    options: UpOptions,
    instances: Mapping[str, InstanceOptions],
) -> ServerProcess:
    addresses = {
        pool.name: [instances[f"{pool.name}-{i}"].url for i in range(pool.replicas)]
        for pool in topology.pools
    }
    server = options.server
    limits = {"host": server.host, "port": server.port, "drain_timeout_s": server.drain_timeout_s}
    folders = {decoder.name: str(decoder.folder.absolute()) for decoder in topology.decoders}
    values = router_options(topology, settings, addresses, folders, limits)
    RouterConfig.parse(values | {"server": server}, source="the router's options")
    file = options.run_dir / "router.yaml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".tmp")
        beside.write_text(yaml.safe_dump(values, sort_keys=False))
        beside.replace(file)
    except OSError as error:
        raise VllmError(f"{file} cannot be written: {error}; choose another --run-dir") from None
    host = f"[{server.host}]" if ":" in server.host else server.host
    return _Router(
        "router",
        [sys.executable, "-m", "prefillshare_train.engines.vllm.router", str(file)],
        # Not in the file, which others may read.
        variables={} if server.api_key is None else {API_KEY_VARIABLE: server.api_key},
        url=f"http://{'127.0.0.1' if server.host == '0.0.0.0' else host}:{server.port}",
        log=options.run_dir / "router.log",
        drain_timeout_s=server.drain_timeout_s,
    )


@contextlib.contextmanager
def _stop_on_signals(stopping: threading.Event) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
