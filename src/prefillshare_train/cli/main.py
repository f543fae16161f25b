"""The `prefillshare` command."""

from __future__ import annotations

import typer

from prefillshare_train.cli import (
    bench,
    compare,
    demo,
    doctor,
    estimate,
    evaluate,
    export,
    held_out,
    inspect,
    lm_eval,
    prefill_worker,
    serve,
    train,
    vllm,
)

app = typer.Typer(
    name="prefillshare",
    help="Fine-tune decoders that read a frozen base model's prompt KV cache.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("estimate")(estimate.estimate)
app.command("inspect")(inspect.inspect)
app.command("held-out")(held_out.held_out)
app.command("eval")(evaluate.evaluate)
app.command("lm-eval", context_settings=lm_eval.CONTEXT_SETTINGS)(lm_eval.lm_eval)
app.command("compare")(compare.compare)
app.command("demo")(demo.demo)
app.command("export")(export.export)
app.command("doctor")(doctor.doctor)
app.command("serve")(serve.serve)
app.command("prefill-worker")(prefill_worker.prefill_worker)
app.command("bench")(bench.bench)
app.add_typer(vllm.app, name="vllm")


def main() -> None:
    """Entry point of the console script."""
    app()
