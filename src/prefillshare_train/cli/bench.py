"""`prefillshare bench --base B --decoder math=D …` or `--url http://… --decoder math …`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def bench(
    base: Annotated[
        str,
        typer.Option(help="Hub id or folder of the base; over HTTP only its tokenizer is read."),
    ],
    decoder: Annotated[
        list[str], typer.Option(help="name=folder, or over HTTP a name; once for each decoder.")
    ],
    url: Annotated[
        str | None, typer.Option(help="Measure this OpenAI-compatible server instead.")
    ] = None,
    workload: Annotated[
        str, typer.Option(help="react, reflexion, uniform, or the file of a recorded trace.")
    ] = "react",
    mode: Annotated[
        Literal["shared", "isolated", "both"],
        typer.Option(
            help="isolated: each decoder finds only what was prefilled for itself, on the same "
            "engine and K/V budget. Over HTTP only a name for the report."
        ),
    ] = "both",
    rate: Annotated[
        str | None,
        typer.Option(
            help="Sessions arriving per second (Poisson), several with commas; all (the default): "
            "at once. Not of a trace, which has its own arrivals."
        ),
    ] = None,
    max_sessions: Annotated[
        str, typer.Option(help="Sessions that run at once, several with commas.")
    ] = "8",
    sessions: Annotated[
        int | None,
        typer.Option(min=1, help="Sessions measured at each load: 32, or those of the trace."),
    ] = None,
    warm_up: Annotated[
        int | None, typer.Option(min=0, help="Sessions before them: 4, or none before a trace.")
    ] = None,
    speed: Annotated[
        float, typer.Option(help="Of a trace: 2 replays it twice as fast as recorded.")
    ] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Medians are reported.")] = 1,
    seed: Annotated[int, typer.Option(help="Of contexts and arrivals.")] = 0,
    traces: Annotated[
        Path | None,
        typer.Option(help="Folder of ReAct trajectories to take lengths from; built in otherwise."),
    ] = None,
    system_tokens: Annotated[
        int, typer.Option(min=0, help="System prompt and tools, the same in every session.")
    ] = 512,
    context_tokens: Annotated[
        int, typer.Option(min=0, help="Further tokens that each session begins with.")
    ] = 0,
    trials: Annotated[int, typer.Option(min=1, help="Of reflexion.")] = 2,
    calls: Annotated[int, typer.Option(min=1, help="Of a uniform session.")] = 8,
    response_tokens: Annotated[int, typer.Option(min=1, help="Of uniform sessions.")] = 32,
    fixed_context: Annotated[
        bool,
        typer.Option(
            "--fixed-context/--generated-context",
            help="Later prompts hold scripted tokens in place of each response, so that every run "
            "sends the same token ids; or what was generated.",
        ),
    ] = True,
    kv_gib: Annotated[float, typer.Option(help="GiB of the KV block pool.")] = 1.0,
    staging_gib: Annotated[
        float, typer.Option(help="GiB of the host tier that cold blocks move to; 0 for none.")
    ] = 0.0,
    session_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens reserved for each session.")
    ] = 0,
    max_decode_rows: Annotated[int, typer.Option(min=1, help="Responses decoded at once.")] = 16,
    ttft_limit: Annotated[float, typer.Option(min=0, help="Of a good request, in seconds.")] = 2.0,
    tpot_limit: Annotated[float, typer.Option(min=0, help="Of a good request, in seconds.")] = 0.2,
    timeout: Annotated[float, typer.Option(min=1, help="Longest call, in seconds.")] = 600.0,
    api: Annotated[Literal["completions", "chat"], typer.Option(help="Over HTTP.")] = "completions",
    api_key: Annotated[
        str | None, typer.Option(envvar="PREFILLSHARE_API_KEY", help="Over HTTP.")
    ] = None,
    extensions: Annotated[
        bool,
        typer.Option(
            "--extensions/--no-extensions",
            help="Over HTTP: send ignore_eos, cache_salt, session_id and end_session, which are "
            "not OpenAI's. Without them responses end where the server likes, and only one load "
            "is measured.",
        ),
    ] = True,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of base and decoders; the decoders' K/V dtype otherwise."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda:1 or cpu; the first GPU where there is one.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Write the requests of the first load that is run as a trace."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of results; a killed run goes on there.")
    ] = Path("runs/bench"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Over HTTP: go on with loads of an earlier start of the server, or of one that "
            "does not tell when it was started. As it is now, it must answer as it did then.",
        ),
    ] = False,
) -> None:
    """Drive agent sessions against an engine or a server; report latency, throughput and hits."""
    from prefillshare_train.cli.errors import user_errors

    with user_errors("serve"):
        from transformers import AutoTokenizer

        from prefillshare_train.cli.bench_targets import (
            engines,
            http_server,
            modes_of,
            names_of,
            refuse_with_a_trace,
            require_one_load,
        )
        from prefillshare_train.workloads.metrics import Objectives
        from prefillshare_train.workloads.points import (
            DrawnWorkload,
            PointStore,
            RecordedWorkload,
            Workload,
        )
        from prefillshare_train.workloads.run import (
            Grid,
            choose_lengths,
            numbers,
            regime_of,
            run_grid,
        )
        from prefillshare_train.workloads.sessions import Session, SessionPlan
        from prefillshare_train.workloads.trace import read_trace
        from prefillshare_train.workloads.vocabulary import ordinary_token_ids

        names = names_of(decoder, served=url is not None)
        is_drawn = workload in ("react", "reflexion", "uniform")
        recorded: list[Session] = []
        if not is_drawn:
            refuse_with_a_trace({"--rate": rate, "--sessions": sessions, "--warm-up": warm_up})
            recorded = read_trace(Path(workload), names, speed=speed)
        caps = numbers(max_sessions, "--max-sessions")
        rates = numbers(rate or "all", "--rate", float, words={"all": None})
        kv_bytes = round(kv_gib * (1 << 30))
        tokenizer = AutoTokenizer.from_pretrained(base)
        if url is None:
            target = engines(base, decoder, dtype, device, max_decode_rows=max_decode_rows)
        else:
            target = http_server(
                url, api, tokenizer, api_key, timeout, extensions=extensions, resume=resume
            )
        load: Workload
        if is_drawn:
            lengths = choose_lengths(traces, tokenizer)
            typer.echo(f"lengths: {lengths.source}")
            plan = SessionPlan(
                workload,
                names,
                ordinary_token_ids(tokenizer),
                lengths,
                system_tokens,
                context_tokens,
                trials,
                calls,
                response_tokens,
                seed,
                target.header,
            )
            load = DrawnWorkload(plan)
            asked = plan.sessions(32 if sessions is None else sessions)
            warm_up = 4 if warm_up is None else warm_up
        else:
            asked = recorded
            load = RecordedWorkload(recorded)
            rates, warm_up = [load.sessions_per_s], 0
        token_bytes = target.token_bytes
        grid = Grid(
            workload=Path(workload).stem,
            modes=modes_of(mode, served=url is not None),
            rates=rates,
            caps=caps,
            decoders=len(names),
            sessions=len(asked),
            warm_up=warm_up,
            repeats=repeats,
            kv_bytes=kv_bytes,
            staging_bytes=round(staging_gib * (1 << 30)),
            session_tokens=session_tokens,
            regimes={}
            if token_bytes is None
            else {cap: regime_of(asked, cap, kv_bytes, token_bytes) for cap in caps},
        )
        if url is not None and not extensions:
            require_one_load(grid)
        setup: dict[str, Any] = {
            "base": base,
            "decoders": decoder,
            "identity": target.identity,
            "url": url,
            "api": api,
            "extensions": extensions,
            "dtype": dtype,
            "device": target.device,
            "seed": seed,
        }
        setup |= {"workload": workload, "traces": str(traces), "speed": speed}
        setup |= {"max_decode_rows": max_decode_rows}
        setup |= {"system_tokens": system_tokens, "context_tokens": context_tokens}
        setup |= {"trials": trials, "calls": calls, "response_tokens": response_tokens}
        tables = run_grid(
            grid,
            load,
            target.client_of,
            out,
            PointStore(
                out / "points", setup, device=target.device, server_start=target.server_start
            ),
            objectives=Objectives(ttft_limit, tpot_limit),
            fixed_context=fixed_context,
            timeout_s=timeout,
            record=record,
        )
    typer.echo(f"{tables}\n{out / 'bench.json'}")
