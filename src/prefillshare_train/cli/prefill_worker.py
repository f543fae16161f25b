"""`prefillshare prefill-worker --base B --listen HOST:PORT`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def prefill_worker(
    base: Annotated[str, typer.Option(help="Hub id or folder of the base.")],
    key: Annotated[
        str,
        typer.Option(
            envvar="PREFILLSHARE_PREFILL_KEY",
            show_envvar=True,
            help="Secret that engines must have; the variable keeps it out of the process list.",
        ),
    ],
    listen: Annotated[
        str, typer.Option(help="Address to listen on. K/V travel unencrypted: keep it private.")
    ] = "127.0.0.1:9000",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of the base and its K/V; the engine's. bfloat16 where this machine multiplies in "
            "it, float32 elsewhere."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1 or cpu; the first GPU where there is one.")
    ] = None,
) -> None:
    """Prefill prompts for a `prefillshare serve` elsewhere."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("serve"):
        import torch

        from prefillshare_train.core.contract import weights_fingerprint
        from prefillshare_train.core.devices import default_device, default_dtype
        from prefillshare_train.core.modules import load_causal_lm
        from prefillshare_train.serving.remote import PrefillServer, parse_address

        address = parse_address(listen)
        place = device or default_device()
        kv_dtype = default_dtype(place) if dtype is None else getattr(torch, dtype)
        model = load_causal_lm(base, dtype=kv_dtype, device=place)
        model.requires_grad_(False).eval()
        server = PrefillServer(model, weights_fingerprint(model), address, key.encode())
        host, port = server.address
        typer.echo(f"prefill worker of {base} at {host}:{port}")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            server.close()
