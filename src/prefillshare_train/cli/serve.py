"""`prefillshare serve --base B --decoder NAME=PATH…`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

GIB = 1 << 30


def serve(
    base: Annotated[str, typer.Option(help="Hub id or folder of the base.")],
    decoder: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a decoder trained over the base; may be given often."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="PREFILLSHARE_API_KEY",
            show_envvar=True,
            help="Clients must send it as `Authorization: Bearer KEY`. The variable keeps it out "
            "of the list of processes.",
        ),
    ] = None,
    serve_base: Annotated[bool, typer.Option(help="Also answer as the base, called base.")] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="Without decoders: a .jinja file or packaged name.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of base and decoders; the decoders' K/V dtype otherwise."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1 or cpu; the first GPU where there is one.")
    ] = None,
    kv_gib: Annotated[float, typer.Option(help="GiB of the KV block pool.")] = 1.0,
    staging_gib: Annotated[
        float, typer.Option(help="GiB of the host tier that cold blocks move to; 0 for none.")
    ] = 0.0,
    block_tokens: Annotated[int, typer.Option(help="Tokens in a block.")] = 16,
    max_decode_rows: Annotated[int, typer.Option(help="Responses that decode at once.")] = 16,
    chunk_tokens: Annotated[
        int, typer.Option(help="Tokens of a step: one a decoding row, the rest for prefill.")
    ] = 256,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; one more is answered 429.")
    ] = 256,
    prefill_ahead: Annotated[
        int, typer.Option(help="Requests prefilled ahead of a decoding row (back-pressure).")
    ] = 4,
    session_tokens: Annotated[
        int, typer.Option(help="Tokens reserved for each session; 0 reserves none.")
    ] = 0,
    session_idle_s: Annotated[
        float, typer.Option(help="An idle session loses its reservation after so long.")
    ] = 60.0,
    aging_tokens_per_s: Annotated[
        float, typer.Option(help="How fast a waiting long prompt overtakes shorter ones.")
    ] = 500.0,
    prefill_workers: Annotated[int, typer.Option(help="Prefill workers.")] = 1,
    disaggregated: Annotated[
        bool, typer.Option(help="Run each prefill worker as a process; on CPUs only.")
    ] = False,
    prefill_address: Annotated[
        list[str] | None,
        typer.Option(
            help="HOST:PORT of a `prefillshare prefill-worker`, in place of local ones; may be "
            "given often."
        ),
    ] = None,
    prefill_key: Annotated[
        str,
        typer.Option(
            envvar="PREFILLSHARE_PREFILL_KEY",
            show_envvar=True,
            help="Secret shared with the workers at `--prefill-address`.",
        ),
    ] = "",
    mode: Annotated[
        Literal["shared", "isolated"],
        typer.Option(help="isolated: no decoder finds another's blocks (the baseline)."),
    ] = "shared",
    max_body_mib: Annotated[float, typer.Option(help="Longest request body, in MiB.")] = 4.0,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="Longest prompt; what engine and model hold otherwise.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest response that may be asked for.")] = 4096,
    max_n: Annotated[int, typer.Option(help="Responses that one request may ask for.")] = 16,
    drain_timeout_s: Annotated[
        float, typer.Option(help="After SIGTERM, how long running responses may take.")
    ] = 30.0,
) -> None:
    """Serve decoders off one prefill, by OpenAI's API and a page."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("serve"):
        from prefillshare_train.serving.api import ServingError
        from prefillshare_train.serving.config import EngineConfig
        from prefillshare_train.serving.server.config import ServerConfig

        folders: dict[str, Path] = {}
        for text in decoder or []:
            name, equals, folder = text.partition("=")
            if not (name and equals and folder):
                raise ServingError(f"--decoder {text}: give NAME=FOLDER")
            if name in folders:
                raise ServingError(f"--decoder {text}: {name} is given twice")
            folders[name] = Path(folder)
        server_config = ServerConfig(
            host=host,
            port=port,
            api_key=api_key,
            max_body_bytes=round(max_body_mib * (1 << 20)),
            max_prompt_tokens=max_prompt_tokens,
            max_tokens=max_tokens,
            max_n=max_n,
            drain_timeout_s=drain_timeout_s,
        )
        engine_config = EngineConfig(
            mode=mode,
            kv_bytes=round(kv_gib * GIB),
            block_tokens=block_tokens,
            max_decode_rows=max_decode_rows,
            chunk_tokens=chunk_tokens,
            max_waiting=max_waiting,
            prefill_ahead=prefill_ahead,
            session_tokens=session_tokens,
            session_idle_s=session_idle_s,
            staging_bytes=round(staging_gib * GIB),
            aging_tokens_per_s=aging_tokens_per_s,
            prefill_workers=prefill_workers,
            disaggregated=disaggregated,
            prefill_addresses=tuple(prefill_address or ()),
            prefill_key=prefill_key,
        )
        # After the options have been checked: these take seconds to import, and the models longer.
        import torch

        from prefillshare_train.serving.engine import Engine
        from prefillshare_train.serving.models import ServedModels
        from prefillshare_train.serving.server.run import make_server

        models = ServedModels.load(
            base,
            folders,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            chat_template=chat_template,
            serve_base=serve_base,
        )
        with Engine(models, engine_config) as engine:
            make_server(engine, engine.drain, server_config).run()
