"""`prefillshare eval --base B --decoder D… --tasks gsm8k,…`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    base: Annotated[str, typer.Option(help="Hub id or folder of the base.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="gsm8k, gsm_plus, humaneval, humaneval_plus, bfcl_simple_python, bfcl_multiple; "
            "several with commas."
        ),
    ],
    decoder: Annotated[
        list[str] | None,
        typer.Option(help="`base` or a decoder's folder, or name= and one; may be given often."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Of a base on a hub; where not given, what the decoders' contracts say."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of this evaluation.")] = Path("runs/eval"),
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the benchmarks' files; where not given, ../shared/data, and what is "
            "not there from the harnesses' own packages and caches."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First items of each task.")] = None,
    prefill: Annotated[
        Literal["base", "self"] | None,
        typer.Option(
            help="Who runs the prompts. Where not given: the base for conditioned decoders, and "
            "for full_prompt decoders first they themselves, then the base (naive sharing)."
        ),
    ] = None,
    sharing_ratio: Annotated[
        str, typer.Option(help="Evaluate every decoder at these ratios: 0,0.25,0.5,0.75,1.")
    ] = "",
    bfcl_style: Annotated[
        Literal["chat_template", "prompting"],
        typer.Option(help="The template's tool calling, or BFCL's prompt."),
    ] = "chat_template",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer; the benchmark's own otherwise.")
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Without decoders: a .jinja file or packaged name."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="Of base and decoders; the decoders' K/V dtype otherwise. Tables mark a decoder "
            "that was trained in another."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1 or cpu; the first GPU where there is one.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Answers of each decoder that decode at once.")
    ] = 16,
    prefill_tokens: Annotated[
        int, typer.Option(min=1, help="Prompt tokens whose K/V are held at once.")
    ] = 32768,
    allow_contract_mismatch: Annotated[
        bool, typer.Option(help="Evaluate over another base than the contract's; tables say so.")
    ] = False,
    judge_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Programs judged at one time; 2, and 1 for HumanEval+ otherwise."),
    ] = None,
    timeout_scale: Annotated[
        float, typer.Option(help="Multiplies HumanEval's 3 seconds for a program.")
    ] = 1.0,
    min_time_limit: Annotated[
        float, typer.Option(help="Seconds that HumanEval+ grants each test at least.")
    ] = 4.0,
    allow_network: Annotated[
        bool, typer.Option(help="Run model-written code also where its network cannot be cut.")
    ] = False,
) -> None:
    """Evaluate decoders as they are served; a killed run goes on where it was."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("eval"):
        import torch

        from prefillshare_train.evaluation.compare import savings_of
        from prefillshare_train.evaluation.contestants import (
            BASE,
            Contestants,
            DecoderSpec,
            renderer_of,
        )
        from prefillshare_train.evaluation.records import read_json
        from prefillshare_train.evaluation.run import Limits
        from prefillshare_train.evaluation.run import evaluate as run
        from prefillshare_train.evaluation.task import EvaluationError
        from prefillshare_train.evaluation.tasks import make_tasks
        from prefillshare_train.evaluation.variants import variants_of

        try:
            ratios = [float(part) for part in sharing_ratio.split(",") if part.strip()]
        except ValueError:
            raise EvaluationError(
                f"--sharing-ratio {sharing_ratio}: give numbers from 0 to 1 with commas"
            ) from None
        specs = [DecoderSpec.parse(text) for text in decoder or [BASE]]
        # Before the weights, which take long to load.
        prompts = renderer_of(base, specs, revision=revision, chat_template=chat_template)
        chosen = make_tasks(
            tasks.split(","),
            data,
            completion=prompts.is_plain,
            bfcl_style=bfcl_style,
            max_new_tokens=max_new_tokens,
            judge_workers=judge_workers,
            timeout_scale=timeout_scale,
            min_time_limit=min_time_limit,
            allow_network=allow_network,
        )
        contestants = Contestants(
            base,
            specs,
            revision=revision,
            chat_template=chat_template,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            allow_mismatch=allow_contract_mismatch,
        )
        variants = variants_of(contestants.decoders, prefill, ratios)
        limits = Limits(items=limit, batch_size=batch_size, prefill_tokens=prefill_tokens)
        summary = run(contestants, variants, chosen, out, limits)
        for saving in savings_of(read_json(summary)):
            typer.echo(saving)
    typer.echo(f"summary: {summary}; a table: prefillshare compare {out}")
