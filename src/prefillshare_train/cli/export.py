"""`prefillshare export CHECKPOINT --to DIR|owner/name`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's folder, its decoder, or one of its checkpoints.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="A new folder, or owner/name on the hub. hf://owner/name where a folder of that "
            "name could be meant."
        ),
    ],
    merge: Annotated[
        bool, typer.Option(help="Add a LoRA decoder to its base and write a full checkpoint.")
    ] = False,
    format: Annotated[
        Literal["hf", "alora"],
        typer.Option(help="alora: an adapter that stock PEFT starts at the assistant header."),
    ] = "hf",
    base: Annotated[
        str | None, typer.Option(help="What others call the base, where the run used a folder.")
    ] = None,
    base_revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the base on the hub.")
    ] = None,
    base_path: Annotated[
        str | None, typer.Option(help="For --merge: where the base lies, if no longer there.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of merged weights; the K/V dtype of the contract otherwise."),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    evaluation: Annotated[
        Path | None, typer.Option(help="Folder of `prefillshare eval`, for the model card.")
    ] = None,
    hardware: Annotated[str | None, typer.Option(help="For the card: what it trained on.")] = None,
    co2_grams: Annotated[
        float | None, typer.Option(min=0, help="For the card: measured emissions of the run.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the card: an identifier such as apache-2.0.")
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch on the hub.")] = "main",
    message: Annotated[str | None, typer.Option(help="Of the commit on the hub.")] = None,
    public: Annotated[bool, typer.Option(help="Let everybody see it; private otherwise.")] = False,
) -> None:
    """Write a decoder as others load it, or push it to the hub."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors():
        from prefillshare_train.hub.card import CardFacts
        from prefillshare_train.hub.export import ExportOptions, export_decoder
        from prefillshare_train.hub.push import PushOptions, hub_target, publish_decoder

        options = ExportOptions(
            merge=merge,
            format=format,
            base_id=base,
            base_revision=base_revision,
            base=base_path,
            dtype=dtype,
            shard_size=shard_size,
            card=CardFacts(
                evaluation=evaluation, hardware=hardware, co2_grams=co2_grams, license=license
            ),
        )
        repo_id = hub_target(to)
        if repo_id is None:
            typer.echo(f"decoder: {export_decoder(checkpoint, Path(to), options)}")
            return
        typer.echo(f"pushing to {repo_id} ({'public' if public else 'private'})", err=True)
        push = PushOptions(revision=revision, message=message, public=public)
        typer.echo(publish_decoder(checkpoint, repo_id, options, push))
