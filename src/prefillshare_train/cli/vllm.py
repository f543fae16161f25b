"""`prefillshare vllm up|plan`: decoders on stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from prefillshare_train.engines.vllm.topology import Topology

app = typer.Typer(help="Serve decoders on stock vLLM.", no_args_is_help=True)

Base = Annotated[str, typer.Option(help="Hub id or folder of the base.")]
Decoders = Annotated[
    list[str], typer.Option("--decoder", help="NAME=FOLDER of a decoder; may be given often.")
]
Lora = Annotated[
    bool,
    typer.Option("--lora", help="Base and LoRA decoders in one process, through the store."),
]
Route = Annotated[
    Literal["store", "nixl"],
    typer.Option(help="How K/V get from the base's processes to the decoders'."),
]
PrefillReplicas = Annotated[
    int, typer.Option(min=1, help="Processes of the base (with --lora: of all).")
]
DecodeReplicas = Annotated[int, typer.Option(min=1, help="Processes of each decode pool.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Of weights and K/V; the decoders' K/V dtype otherwise."),
]
BlockSize = Annotated[int | None, typer.Option(help="Tokens of a KV block; vLLM's otherwise.")]
MaxModelLen = Annotated[
    int | None, typer.Option(help="Longest prompt and response; the model's otherwise.")
]
KvGib = Annotated[int, typer.Option(min=1, help="On CPU: GiB of KV cache of each process.")]
Store = Annotated[str, typer.Option(help="Folder of the block store.")]
StoreGib = Annotated[float, typer.Option(help="Budget of the block store, in GiB.")]
StoreWaitS = Annotated[
    float, typer.Option(min=0, help="How long a decoder waits for a prefill under way.")
]
OnMiss = Annotated[
    Literal["fail", "recompute"],
    typer.Option(help="Without the base's K/V: fail, or let the decoder prefill (wrong, loud)."),
]
VllmArg = Annotated[
    list[str] | None,
    typer.Option(help="Argument of each vLLM process, as --vllm-arg=--max-num-seqs=8."),
]


@app.command()
def up(
    base: Base,
    decoder: Decoders,
    lora: Lora = False,
    route: Route = "store",
    prefill_replicas: PrefillReplicas = 1,
    decode_replicas: DecodeReplicas = 1,
    host: Annotated[
        str, typer.Option(help="Address of the router; others than loopback need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port of the router.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PREFILLSHARE_API_KEY", show_envvar=True, help="What clients must send."
        ),
    ] = None,
    instance_port: Annotated[
        int, typer.Option(help="First port of the vLLM processes, which listen on loopback.")
    ] = 8100,
    vllm_python: Annotated[
        Path | None,
        typer.Option(help="Python that has vLLM; this one otherwise, or .venv-vllm here."),
    ] = None,
    run_dir: Annotated[Path, typer.Option(help="Folder of the logs.")] = Path("runs/vllm"),
    dtype: Dtype = None,
    block_size: BlockSize = None,
    max_model_len: MaxModelLen = None,
    kv_gib: KvGib = 4,
    store: Store = "/dev/shm/prefillshare",
    store_gib: StoreGib = 4.0,
    store_wait_s: StoreWaitS = 30.0,
    on_miss: OnMiss = "fail",
    devices: Annotated[
        list[str] | None,
        typer.Option(
            help="INSTANCE=LIST: CPU cores (CPU builds) or GPUs of one process, such as "
            "prefill-0=0-3; the others share evenly."
        ),
    ] = None,
    ready_timeout_s: Annotated[
        float, typer.Option(help="How long the vLLM processes may take to start.")
    ] = 600.0,
    restarts: Annotated[
        int, typer.Option(min=0, help="Restarts of one process within ten minutes.")
    ] = 3,
    drain_timeout_s: Annotated[
        float, typer.Option(help="When stopped, how long running responses may take.")
    ] = 30.0,
    vllm_arg: VllmArg = None,
) -> None:
    """Start and supervise base, decoders and router on this machine."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("vllm"):
        from prefillshare_train.engines.vllm.launches import InstanceSettings
        from prefillshare_train.engines.vllm.supervisor import RestartPolicy
        from prefillshare_train.engines.vllm.topology import parse_pairs
        from prefillshare_train.engines.vllm.up import UpOptions, run_up
        from prefillshare_train.engines.vllm.vllm_python import find_python, look_into
        from prefillshare_train.serving.server.config import ServerConfig

        server = ServerConfig(
            host=host, port=port, api_key=api_key, drain_timeout_s=drain_timeout_s
        )
        topology = _topology(base, decoder, lora, route, prefill_replicas, decode_replicas)
        python = look_into(find_python(vllm_python))
        for warning in python.require(nixl=topology.route == "nixl"):
            _tell(f"warning: {warning}")
        settings = InstanceSettings(
            cpu=python.cpu_only,
            dtype=dtype,
            block_size=block_size,
            max_model_len=max_model_len,
            kv_gib=kv_gib,
            store=store,
            store_gib=store_gib,
            store_wait_s=store_wait_s,
            on_miss=on_miss,
            extra=tuple(vllm_arg or ()),
        )
        options = UpOptions(
            python=python.path,
            run_dir=run_dir,
            server=server,
            instance_port=instance_port,
            devices=parse_pairs("--devices", devices or []),
            ready_timeout_s=ready_timeout_s,
            restarts=RestartPolicy(times=restarts),
        )
        run_up(topology, settings, options, tell=_tell)


@app.command()
def plan(
    base: Base,
    decoder: Decoders,
    lora: Lora = False,
    route: Route = "nixl",
    prefill_replicas: PrefillReplicas = 1,
    decode_replicas: DecodeReplicas = 1,
    lora_together: Annotated[
        bool, typer.Option(help="All LoRA decoders in one pool, in place of a pool each.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("vllm-plan"),
    force: Annotated[bool, typer.Option(help="Replace files that are there.")] = False,
    image: Annotated[
        str, typer.Option(help="Image with vLLM and this package, as the Dockerfile builds it.")
    ] = "prefillshare-vllm:latest",
    from_image: Annotated[
        str | None, typer.Option(help="What the Dockerfile starts from; vLLM's image otherwise.")
    ] = None,
    model_root: Annotated[
        str, typer.Option(help="Folder in the containers under which models lie.")
    ] = "/models",
    namespace: Annotated[str, typer.Option(help="Of Kubernetes.")] = "prefillshare",
    monitoring_namespace: Annotated[
        str, typer.Option(help="Namespace of the Prometheus that reads the instances' metrics.")
    ] = "monitoring",
    max_replicas: Annotated[
        int, typer.Option(min=1, help="To which autoscaling may take a pool.")
    ] = 8,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of a process.")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores of a process.")] = 8,
    memory_gib: Annotated[int, typer.Option(min=1, help="Memory of a process.")] = 64,
    cpu: Annotated[bool, typer.Option(help="For builds of vLLM that run on CPUs.")] = False,
    dtype: Dtype = None,
    block_size: BlockSize = None,
    max_model_len: MaxModelLen = None,
    kv_gib: KvGib = 4,
    store: Store = "/dev/shm/prefillshare",
    store_gib: StoreGib = 16.0,
    store_wait_s: StoreWaitS = 30.0,
    on_miss: OnMiss = "fail",
    vllm_arg: VllmArg = None,
) -> None:
    """Write command lines, a compose file and Kubernetes manifests for a cluster."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("vllm"):
        from prefillshare_train.engines.vllm.launches import InstanceSettings
        from prefillshare_train.engines.vllm.plan import UPSTREAM_IMAGE, PlanOptions, write_plan

        topology = _topology(
            base, decoder, lora, route, prefill_replicas, decode_replicas, lora_together
        )
        settings = InstanceSettings(
            cpu=cpu,
            dtype=dtype,
            block_size=block_size,
            max_model_len=max_model_len,
            kv_gib=kv_gib,
            store=store,
            store_gib=store_gib,
            store_wait_s=store_wait_s,
            on_miss=on_miss,
            extra=tuple(vllm_arg or ()),
        )
        options = PlanOptions(
            out=out,
            image=image,
            from_image=from_image or UPSTREAM_IMAGE,
            model_root=model_root,
            gpus=gpus,
            cpus=cpus,
            memory_gib=memory_gib,
            max_replicas=max_replicas,
            namespace=namespace,
            monitoring_namespace=monitoring_namespace,
            force=force,
        )
        for path in write_plan(topology, settings, options, tell=_tell):
            typer.echo(path)


def _topology(
    base: str,
    texts: list[str],
    lora: bool,
    route: Literal["store", "nixl"],
    prefill_replicas: int,
    decode_replicas: int,
    lora_together: bool = True,
) -> Topology:
    from prefillshare_train.engines.vllm.topology import Topology, parse_decoders, read_decoder

    folders = parse_decoders(texts)
    return Topology(
        base=base,
        decoders=tuple(read_decoder(name, folder) for name, folder in folders.items()),
        route="lora" if lora else route,
        prefill_replicas=prefill_replicas,
        decode_replicas=decode_replicas,
        lora_together=lora_together,
    )


def _tell(line: str) -> None:
    typer.echo(f"prefillshare vllm: {line}", err=True)
