"""Evaluation end to end on tiny models: variants, sharing, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.helpers import write_jsonl
from tests.evaluation.vowels import LIMITS, Vowels
from tests.training import tiny

from prefillshare_train.core.contract import ContractError
from prefillshare_train.core.generate import generate
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.core.prompt_cache import CacheRows
from prefillshare_train.evaluation import answering
from prefillshare_train.evaluation.contestants import Contestants, DecoderSpec
from prefillshare_train.evaluation.records import RunFolder
from prefillshare_train.evaluation.run import Limits, evaluate
from prefillshare_train.evaluation.task import EvalItem, EvaluationError, Verdict
from prefillshare_train.evaluation.variants import variants_of
from prefillshare_train.training.recipe import load_recipe
from prefillshare_train.training.run import run_training

RECIPE = """
base: {{model: {base}, dtype: float32}}
decoder: {{adapter: lora, lora: {{r: 4, target_modules: all-linear}}}}
data: {{train: {{source: {rows}}}, eval_fraction: 0.3}}
training: {{output_dir: replaced, max_steps: 3, learning_rate: 0.02, report_to: none,
           per_device_train_batch_size: 4, use_cpu: true, disable_tqdm: true}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and decoders of both methods and both kinds."""
    folder = tmp_path_factory.mktemp("evaluation")
    base = tiny.save_base(folder / "base")
    lively = tiny.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in lively.parameters():
            if weight.ndim > 1:
                weight.mul_(10)  # as initialised, it says one letter again and again
    lively.save_pretrained(base)
    rows = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(30)]
    source = write_jsonl(folder / "rows.jsonl", rows)
    (folder / "recipe.yaml").write_text(RECIPE.format(base=base, rows=source))
    wanted = {
        "ours": [],
        "other": ["training.seed=5"],
        "full": ["decoder.adapter=none"],
        "sft": ["method=full_prompt"],
        "aligned": ["boundary=block_aligned:4"],
        "head": ["decoder.lora.target_modules=[q_proj,lm_head]"],
    }
    for name, overrides in wanted.items():
        place = f"training.output_dir={folder / name}"
        run_training(load_recipe([folder / "recipe.yaml"], [*overrides, place]))
    return folder


def contestants(folder: Path, *names: str, **options: Any) -> Contestants:
    specs = [
        DecoderSpec.parse("base" if name == "base" else str(folder / name / "decoder"))
        for name in names
    ]
    return Contestants(str(folder / "base"), specs, **options)


def outputs(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = (out / "outputs" / "vowels.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    found = {(r["variant"], r["item_id"]): r for r in records}
    assert len(found) == len(records), "an item was answered twice"
    return found


def test_every_variant_answers_as_it_would_alone(folder: Path, tmp_path: Path) -> None:
    loaded = contestants(folder, "base", "ours", "full", "sft", "aligned", "head")
    variants = variants_of(loaded.decoders, None, [])
    labels = [(v.decoder.name, v.label, v.prefill) for v in variants]
    assert labels == [
        ("base", "base", "self"),
        ("ours", "PrefillShare", "base"),
        ("full", "PrefillShare", "base"),
        ("sft", "Full-FT", "self"),
        ("sft", "naive", "base"),
        ("aligned", "PrefillShare", "base"),
        ("head", "PrefillShare", "base"),
    ]
    evaluate(loaded, variants, [Vowels(stop="never said")], tmp_path / "whole", LIMITS)
    whole = [record["output"] for record in outputs(tmp_path / "whole").values()]
    # What tiny models say depends on the machine's rounding: stop at what is said seldom here.
    counts = Counter(letter for text in whole for letter in text[:-1])
    stop = min((count, letter) for letter, count in counts.items() if letter.isascii())[1]
    evaluate(loaded, variants, [Vowels(stop=stop)], tmp_path / "run", LIMITS)
    found = outputs(tmp_path / "run")
    assert len(found) == 7 * 7
    spoken = {tuple(found[v.key, f"v/{n}"]["output"] for n in range(7)) for v in variants}
    assert len(spoken) == 7, "two variants say the same, so that mixing them up would not show"
    stopped_early = 0
    for variant in variants:
        # One decoder alone, one prompt at a time, with nothing shared.
        name = variant.decoder.name
        alone = contestants(folder, name)
        if name == "base":
            prefill, model = alone.prefill, alone.prefill.model
        else:
            own = load_decoder(folder / name / "decoder")
            prefill, model = own.prefill, own.decoder
        for item in Vowels(stop=stop).items():
            text = alone.renderer.text(item.messages, add_generation_prompt=True)
            ids = alone.renderer.encode([text + item.response_prefix])[0]
            cut = variant.base_length(len(ids), 0)
            (answer,) = generate(
                model,
                prefill.prefill([ids[:cut]]),
                [ids],
                max_new_tokens=item.max_new_tokens,
                stop_ids=alone.renderer.end_token_ids,
            )
            texts = [
                alone.renderer.decode(answer[: n + 1], skip_special_tokens=True)
                for n in range(len(answer))
            ]
            stopped = [n + 1 for n, text in enumerate(texts) if stop in text]
            text = texts[-1].partition(stop)[0]
            record = found[variant.key, item.item_id]
            assert record["output_tokens"] == (stopped or [len(answer)])[0]
            stopped_early += bool(stopped) and stopped[0] < len(answer)
            assert record["output"] == text
            assert record["base_tokens"] == cut
            assert record["prompt_tokens"] == len(ids)
    assert stopped_early, "no answer reached its stop string, so that going on would not show"


def test_adapters_of_one_base_answer_in_one_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each decoder one variant, the base's among them; whole models and whole prompts apart."""
    plain, batches = answering.generate, []

    def watched(*args: Any, **options: Any) -> Any:
        batches.append((len(args[2]), options["batch_size"]))
        assert isinstance(args[1], CacheRows), "the prompts' K/V were copied for every decoder"
        return plain(*args, **options)

    monkeypatch.setattr(answering, "generate", watched)
    names = ("base", "ours", "aligned", "sft", "full")
    loaded = contestants(folder, *names)
    limits = Limits(batch_size=3, prefill_tokens=10_000)
    variants = variants_of(loaded.decoders, "base", [])
    evaluate(loaded, variants, [Vowels()], tmp_path / "base", limits)
    assert batches == [(7 * 4, 3 * 4), (7, 3)]
    batches.clear()
    variants = variants_of(loaded.decoders[1:3], None, [0, 0.5, 1])
    evaluate(loaded, variants, [Vowels()], tmp_path / "ratios", limits)
    assert batches == [(7, 3), (7 * 2, 3 * 2), (7 * 2, 3 * 2), (7, 3)]


def test_the_summary_counts_what_the_items_say(folder: Path, tmp_path: Path) -> None:
    loaded = contestants(folder, "ours", "other", "sft")
    variants = variants_of(loaded.decoders, None, [])
    summary = json.loads(evaluate(loaded, variants, [Vowels()], tmp_path, LIMITS).read_text())
    for row in summary["results"]:
        path = tmp_path / "items" / "vowels" / f"{row['variant']}.jsonl"
        items = [json.loads(line) for line in path.read_text().splitlines()]
        assert row["n"] == len(items) == 7
        assert row["score"] == sum(item["correct"] for item in items) / 7
        assert row["ci95"][0] <= row["score"] <= row["ci95"][1]
    saving = summary["shared_prefill"]["vowels"]
    shared = [r["base_tokens"] for (v, _), r in outputs(tmp_path).items() if "self" not in v]
    assert saving["base_tokens_if_apart"] == sum(shared)
    assert saving["base_tokens"] == sum(shared) / 3, "the base ran a prompt more than once"
    assert summary["tasks"]["vowels"]["notes"] == ["Made up."]
    assert summary["contracts"]["sft"]["method"] == "full_prompt"
    times = [row["decode_seconds"] for row in summary["results"]]
    assert summary["wall_seconds"] == pytest.approx(sum(times) + saving["prefill_seconds"], abs=0.1)


def test_the_base_runs_each_prompt_once_for_all_variants(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = contestants(folder, "ours", "other")
    ran: list[int] = []
    plain = loaded.prefill.prefill

    def counted(prompts: Sequence[Sequence[int]], past: Any = None) -> Any:
        ran.extend(len(ids) for ids in prompts)
        return plain(prompts, past)

    monkeypatch.setattr(loaded.prefill, "prefill", counted)
    variants = variants_of(loaded.decoders, None, [0, 0.5, 1])
    path = evaluate(loaded, variants, [Vowels()], tmp_path, LIMITS)
    assert len(ran) == 7
    assert sum(ran) == json.loads(path.read_text())["shared_prefill"]["vowels"]["base_tokens"]


def test_sharing_ratios_go_from_self_to_base(folder: Path, tmp_path: Path) -> None:
    loaded = contestants(folder, "sft")
    evaluate(loaded, variants_of(loaded.decoders, None, [0, 0.5, 1]), [Vowels()], tmp_path, LIMITS)
    plain = tmp_path / "plain"
    evaluate(loaded, variants_of(loaded.decoders, None, []), [Vowels()], plain, LIMITS)
    at_ratio, alone = outputs(tmp_path), outputs(plain)
    for n in range(7):
        item = f"v/{n}"
        assert at_ratio["sft--self", item]["output"] == alone["sft--self", item]["output"]
        ends = at_ratio["sft--ratio_1", item], alone["sft--last_token", item]
        assert ends[0]["output"] == ends[1]["output"]
        half = at_ratio["sft--ratio_0.5", item]
        assert half["base_tokens"] == half["prompt_tokens"] // 2
    with pytest.raises(EvaluationError, match="from 0 to 1"):
        variants_of(loaded.decoders, None, [1.5])


def test_a_killed_run_goes_on_and_answers_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = contestants(folder, "ours", "sft")
    variants = variants_of(loaded.decoders, None, [])
    whole = tmp_path / "whole"
    reference = evaluate(loaded, variants, [Vowels()], whole, LIMITS)
    out = tmp_path / "killed"
    written: list[int] = []
    plain = RunFolder.add_outputs

    def dies(self: RunFolder, task: str, records: Any) -> None:
        if len(written) == 5:  # the first holds what other tasks have answered
            raise KeyboardInterrupt
        written.append(1)
        plain(self, task, records)

    monkeypatch.setattr(RunFolder, "add_outputs", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(loaded, variants, [Vowels()], out, LIMITS)
    monkeypatch.setattr(RunFolder, "add_outputs", plain)
    before = outputs(out)
    assert len(before) == 4, "an answer is kept as it ends"
    with (out / "outputs" / "vowels.jsonl").open("a") as file:
        file.write('{"variant": "ours--last_to')  # what a kill in the middle of a write leaves
    evaluate(loaded, variants, [Vowels()], out, LIMITS)
    after = outputs(out)
    assert {key: after[key] for key in before} == before
    assert {k: r["output"] for k, r in after.items()} == {
        k: r["output"] for k, r in outputs(whole).items()
    }
    keep = ("variant", "n", "correct", "output_tokens")
    rows = [json.loads(p.read_text())["results"] for p in (reference, out / "summary.json")]
    assert [[r[k] for k in keep] for r in rows[0]] == [[r[k] for k in keep] for r in rows[1]]
    task = Vowels()
    monkeypatch.setattr(answering, "generate", None)
    evaluate(loaded, variants, [task], out, LIMITS)
    assert task.judged == [], "an item was judged twice"


def test_two_evaluations_do_not_write_one_folder(folder: Path, tmp_path: Path) -> None:
    loaded = contestants(folder, "ours")
    variants = variants_of(loaded.decoders, None, [])
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(EvaluationError, match="another evaluation is writing there"),
    ):
        evaluate(loaded, variants, [Vowels()], tmp_path, LIMITS)
    evaluate(loaded, variants, [Vowels()], tmp_path, LIMITS)


def test_more_items_and_decoders_are_added_to_what_is_there(folder: Path, tmp_path: Path) -> None:
    loaded = contestants(folder, "ours")
    few = Limits(items=2, batch_size=3, prefill_tokens=60)
    evaluate(loaded, variants_of(loaded.decoders, None, []), [Vowels()], tmp_path, few)
    assert len(outputs(tmp_path)) == 2
    task = Vowels()
    loaded = contestants(folder, "ours", "other")
    path = evaluate(loaded, variants_of(loaded.decoders, None, []), [task], tmp_path, LIMITS)
    assert len(task.judged) == 5 + 7
    summary = json.loads(path.read_text())
    assert [row["n"] for row in summary["results"]] == [7, 7]
    path = evaluate(loaded, variants_of(loaded.decoders[:1], None, []), [Vowels()], tmp_path, few)
    again = json.loads(path.read_text())["shared_prefill"]["vowels"]
    assert again["base_tokens_if_apart"] == again["base_tokens"], "counts what is not in the report"
    assert again["base_tokens"] < summary["shared_prefill"]["vowels"]["base_tokens"]


def test_two_tasks_that_ask_the_same_are_answered_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Again(Vowels):
        name = "again"

        def items(self) -> list[EvalItem]:
            same = [dataclasses.replace(i, item_id=f"a/{i.item_id}") for i in super().items()]
            return [*same, dataclasses.replace(same[0], item_id="longer", max_new_tokens=3)]

    loaded = contestants(folder, "ours", "other")
    variants = variants_of(loaded.decoders, None, [])
    asked: list[int] = []
    plain = answering.generate

    def counted(decoder: Any, cache: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return plain(decoder, cache, prompts, **options)

    monkeypatch.setattr(answering, "generate", counted)
    path = evaluate(loaded, variants, [Vowels(), Again()], tmp_path, LIMITS)
    assert sum(asked) == 2 * (7 + 1)
    first, second = json.loads(path.read_text())["results"][::2]
    assert (first["n"], second["n"]) == (7, 8)
    judged = RunFolder(tmp_path).verdicts("again", "ours--last_token")
    for (variant, item), record in outputs(tmp_path).items():
        if variant == "ours--last_token":
            assert judged[f"a/{item}"]["output"] == record["output"]
    lines = (tmp_path / "outputs" / "again.jsonl").read_text()
    evaluate(loaded, variants, [Vowels(), Again()], tmp_path, LIMITS)
    assert (tmp_path / "outputs" / "again.jsonl").read_text() == lines, "taken over twice"
    saved = json.loads(path.read_text())["shared_prefill"]
    assert saved["again"]["base_tokens"] < saved["vowels"]["base_tokens"]


def test_answers_of_something_else_are_not_taken_over(folder: Path, tmp_path: Path) -> None:
    loaded = contestants(folder, "ours")
    variants = variants_of(loaded.decoders, None, [])
    evaluate(loaded, variants, [Vowels()], tmp_path, LIMITS)
    with pytest.raises(EvaluationError, match=r"task vowels was another.*shots is None there"):
        evaluate(loaded, variants, [Vowels(shots=5)], tmp_path, LIMITS)
    renamed = [DecoderSpec("ours", folder / "other" / "decoder")]
    other = Contestants(str(folder / "base"), renamed)
    with pytest.raises(EvaluationError, match=r"variant ours--last_token was another.*sha256"):
        evaluate(other, variants_of(other.decoders, None, []), [Vowels()], tmp_path, LIMITS)
    wider = Contestants(
        str(folder / "base"),
        [DecoderSpec("ours", folder / "ours" / "decoder")],
        dtype=torch.float64,
    )
    with pytest.raises(EvaluationError, match=r"base was another.*float64"):
        evaluate(wider, variants_of(wider.decoders, None, []), [Vowels()], tmp_path, LIMITS)


def test_a_base_that_no_contract_names_is_refused_unless_allowed(
    folder: Path, tmp_path: Path
) -> None:
    strange = tmp_path / "strange"
    torch.manual_seed(9)
    tiny.save_base(strange)
    model = tiny.AutoModelForCausalLM.from_pretrained(strange)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(strange)
    specs = [DecoderSpec.parse(str(folder / "ours" / "decoder"))]
    with pytest.raises(ContractError, match="base fingerprint"):
        Contestants(str(strange), specs)
    loaded = Contestants(str(strange), specs, allow_mismatch=True)
    variants = variants_of(loaded.decoders, None, [])
    path = evaluate(loaded, variants, [Vowels(2)], tmp_path / "run", LIMITS)
    (row,) = json.loads(path.read_text())["results"]
    assert "base fingerprint" in row["contract_mismatch"]


def test_a_decoder_may_have_a_dot_in_its_name(folder: Path, tmp_path: Path) -> None:
    specs = [
        DecoderSpec.parse(f"v1.{n}={folder / name / 'decoder'}")
        for n, name in enumerate(("ours", "other"))
    ]
    dotted = Contestants(str(folder / "base"), specs)
    plain = contestants(folder, "ours", "other")
    evaluate(dotted, variants_of(dotted.decoders, None, []), [Vowels()], tmp_path / "a", LIMITS)
    evaluate(plain, variants_of(plain.decoders, None, []), [Vowels()], tmp_path / "b", LIMITS)
    found, expected = outputs(tmp_path / "a"), outputs(tmp_path / "b")
    for dot, name in (("v1.0", "ours"), ("v1.1", "other")):
        for item in (f"v/{n}" for n in range(7)):
            same = found[f"{dot}--last_token", item], expected[f"{name}--last_token", item]
            assert same[0]["output"] == same[1]["output"]


def test_names(folder: Path) -> None:
    assert DecoderSpec.parse(str(folder / "ours" / "decoder")).name == "ours"
    assert DecoderSpec.parse(f"tools={folder / 'ours' / 'decoder'}").name == "tools"
    with pytest.raises(EvaluationError, match="there is no folder"):
        DecoderSpec.parse("nothing/here")
    with pytest.raises(EvaluationError, match="two decoders are called ours"):
        contestants(folder, "ours", "ours")


def test_an_item_that_does_not_fit_the_model_is_told_before_any_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Long(Vowels):
        def items(self) -> list[EvalItem]:
            return [EvalItem("long", ({"role": "user", "content": "a"},), max_new_tokens=9999)]

    loaded = contestants(folder, "ours")
    monkeypatch.setattr(answering, "generate", None)
    with pytest.raises(EvaluationError, match=r"item long has \d+ prompt tokens and may take 9999"):
        evaluate(loaded, variants_of(loaded.decoders, None, []), [Long()], tmp_path, LIMITS)


class Dated(Vowels):
    """The same settings, and another text: as a template that gives the date."""

    def items(self) -> list[EvalItem]:
        message = {"role": "user", "content": "Today is another day."}
        return [dataclasses.replace(item, messages=(message,)) for item in super().items()]


def test_answers_to_other_prompts_are_refused_before_the_first_answer(
    folder: Path, tmp_path: Path
) -> None:
    loaded = contestants(folder, "ours", "other")
    ours, other = variants_of(loaded.decoders, None, [])
    evaluate(loaded, [ours], [Vowels()], tmp_path, LIMITS)
    before = outputs(tmp_path)
    with pytest.raises(EvaluationError, match=r"item v/0 was answered by .* to another prompt"):
        evaluate(loaded, [other], [Dated()], tmp_path, LIMITS)
    assert outputs(tmp_path) == before


def test_the_summary_keeps_other_tasks_and_decoders(folder: Path, tmp_path: Path) -> None:
    class More(Vowels):
        name = "more"

    class Broken(Vowels):
        name = "broken"

        def judge(self, *_: Any) -> list[Verdict]:
            raise EvaluationError("no verdicts today")

    loaded = contestants(folder, "ours", "other")
    ours, other = variants_of(loaded.decoders, None, [])
    evaluate(loaded, [ours], [Vowels()], tmp_path, LIMITS)
    evaluate(loaded, [other], [Vowels()], tmp_path, LIMITS)
    path = evaluate(loaded, [ours], [More()], tmp_path, LIMITS)
    summary = json.loads(path.read_text())
    found = [(row["task"], row["decoder"]) for row in summary["results"]]
    assert found == [("vowels", "ours"), ("vowels", "other"), ("more", "ours")]
    assert set(summary["tasks"]) == set(summary["shared_prefill"]) == {"vowels", "more"}
    assert set(summary["contracts"]) == {"ours", "other"}
    assert summary["complete"]
    # Two starts, two prefills: nothing was shared.
    assert summary["shared_prefill"]["vowels"]["saved_share"] == 0
    with pytest.raises(EvaluationError, match="no verdicts"):
        evaluate(loaded, [ours], [More(), Broken()], tmp_path, LIMITS)
    assert not json.loads(path.read_text())["complete"]


def test_a_task_that_cannot_be_rendered_binds_no_later_try(folder: Path, tmp_path: Path) -> None:
    class TooLong(Vowels):
        def items(self) -> list[EvalItem]:
            return [dataclasses.replace(i, max_new_tokens=10**6) for i in super().items()]

    loaded = contestants(folder, "ours")
    variants = variants_of(loaded.decoders, None, [])
    with pytest.raises(EvaluationError, match="Lower"):
        evaluate(loaded, variants, [Vowels(), TooLong(version=2)], tmp_path, LIMITS)
    evaluate(loaded, variants, [Vowels(version=3)], tmp_path, LIMITS)
