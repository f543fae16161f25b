"""Tables, intervals, paired tests and plots of finished evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.evaluation.compare import compare
from prefillshare_train.evaluation.plots import plot_sharing
from prefillshare_train.evaluation.records import RunFolder
from prefillshare_train.evaluation.statistics import mcnemar, wilson
from prefillshare_train.evaluation.tables import html, markdown
from prefillshare_train.evaluation.task import EvaluationError


def row(label: str, variant: str, **options: Any) -> dict[str, Any]:
    return {
        "task": "sums",
        "decoder": variant.partition("--")[0],
        "label": label,
        "prefill": "base",
        "boundary": "last_token",
        "sharing_ratio": 1.0,
        "variant": variant,
        "contract_mismatch": "",
        **options,
    }


def write_run(
    folder: Path,
    rows: list[tuple[dict[str, Any], str]],
    notes: tuple[str, ...] = (),
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run whose rows have these verdicts: `1` right, `0` wrong, item by item."""
    results = []
    for entry, verdicts in rows:
        path = folder / "items" / entry["task"] / f"{entry['variant']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        items = [
            {"item_id": str(n), "request_sha256": "p", "correct": v == "1"}
            for n, v in enumerate(verdicts)
        ]
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        right = verdicts.count("1")
        figures = {"n": len(verdicts), "score": right / len(verdicts)}
        results.append({**entry, **figures, "ci95": list(wilson(right, len(verdicts)))})
    tasks = {e["task"]: {"notes": list(notes), "settings": settings or {}} for e, _ in rows}
    summary = {"results": results, "tasks": tasks, "run": {"dtype": "float32"}, "complete": True}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_mcnemar_counts_what_changed() -> None:
    first = [True, True, False, False, False, False, False, False]
    second = [True, False, True, True, True, True, True, True]
    test = mcnemar(first, second)
    assert (test.n, test.gained, test.lost) == (8, 6, 1)
    assert test.difference == 5 / 8
    # Two-sided sign test of 6 out of 7: 2 * (C(7,6) + C(7,7)) / 2**7.
    assert test.p_value == pytest.approx(16 / 128)
    assert mcnemar([True], [True]).p_value == 1


def test_wilson_by_the_formula() -> None:
    right, count, z = 7, 20, 1.959963984540054
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = (
        z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    )
    assert wilson(right, count) == pytest.approx((centre - half, centre + half))
    assert wilson(0, 5)[0] == 0


def test_the_table_holds_every_score_and_the_pairs_that_matter(tmp_path: Path) -> None:
    first = write_run(
        tmp_path / "a",
        [
            (row("PrefillShare", "ours--last_token"), "1111000"),
            (row("base", "base--self", boundary=None, prefill="self"), "0000000"),
        ],
        notes=("Item 3 cannot be solved.",),
    )
    second = write_run(
        tmp_path / "b",
        [
            (row("naive", "sft--last_token"), "1000000"),
            (row("Full-FT", "sft--self", boundary=None, prefill="self"), "1110000"),
        ],
    )
    comparison = compare([first, second])
    assert comparison.names == ["base", "Full-FT (sft)", "naive (sft)", "PrefillShare (ours)"]
    text = markdown(comparison)
    assert "| PrefillShare (ours) | 57.1 [" in text
    assert "n=7" in text
    assert "Item 3 cannot be solved." in text
    pairs = {(a, b): (t.gained, t.lost) for _, a, b, t in comparison.paired}
    assert pairs == {
        ("base", "Full-FT (sft)"): (3, 0),
        ("base", "PrefillShare (ours)"): (4, 0),
        ("Full-FT (sft)", "PrefillShare (ours)"): (1, 0),
        ("naive (sft)", "PrefillShare (ours)"): (3, 0),
    }


def test_curves_are_compared_point_by_point(tmp_path: Path) -> None:
    entries = [(row("Full-FT", "sft--self", boundary=None, prefill="self", sharing_ratio=0), "11")]
    self_prefilled = {"boundary": None, "prefill": "self", "sharing_ratio": 0.0}
    entries.append((row("PrefillShare", "ours--self", **self_prefilled), "10"))
    for ratio in (0.5, 1.0):
        shares = {"boundary": f"ratio:{ratio:g}", "sharing_ratio": ratio}
        entries.append((row("naive", f"sft--ratio-{ratio}", **shares), "00"))
        entries.append((row("PrefillShare", f"ours--ratio-{ratio}", **shares), "10"))
    pairs = {(a, b) for _, a, b, _ in compare([write_run(tmp_path, entries)]).paired}
    ours = "PrefillShare at ratio {} (ours)"
    assert pairs == {
        ("Full-FT (sft)", "PrefillShare without the base's cache (ours)"),
        ("Full-FT (sft)", ours.format("0.5")),
        ("Full-FT (sft)", ours.format("1")),
        ("naive at ratio 0.5 (sft)", ours.format("0.5")),
        ("naive at ratio 1 (sft)", ours.format("1")),
    }


def test_only_items_with_the_same_prompt_are_paired(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [(row("base", "base--self", boundary=None), "00")])
    second = write_run(tmp_path / "b", [(row("PrefillShare", "ours--last_token"), "11")])
    path = second / "items" / "sums" / "ours--last_token.jsonl"
    path.write_text(path.read_text().replace('"p"', '"q"', 1))
    ((_, _, _, test),) = compare([first, second]).paired
    assert test.n == 1


def test_a_decoder_that_does_not_fit_is_marked_wherever_it_stands(tmp_path: Path) -> None:
    entry = row("PrefillShare", "ours--last_token", contract_mismatch="base fingerprint: a, b")
    comparison = compare([write_run(tmp_path, [(entry, "10")])])
    for text in (markdown(comparison), html(comparison, [])):
        assert "(contract does not fit)" in text
        assert "base fingerprint: a, b" in text


def test_two_results_under_one_name_are_refused(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [(row("PrefillShare", "ours--last_token"), verdicts)])
        for name, verdicts in (("a", "10"), ("b", "01"))
    ]
    with pytest.raises(EvaluationError, match="another sums result in another run"):
        compare(runs)
    assert len(compare([runs[0], runs[0]]).results) == 1
    with pytest.raises(EvaluationError, match=r"no summary\.json"):
        compare([tmp_path / "nothing"])


def test_a_conditioned_decoder_that_ran_its_own_prompts_has_a_row_of_its_own(
    tmp_path: Path,
) -> None:
    alone = row("PrefillShare", "ours--self", boundary=None, prefill="self", sharing_ratio=0.0)
    entries = [(row("PrefillShare", "ours--last_token"), "11"), (alone, "00")]
    comparison = compare([write_run(tmp_path, entries)])
    shown = {result.name: result.row["score"] for result in comparison.results}
    assert shown == {
        "PrefillShare (ours)": 1.0,
        "PrefillShare without the base's cache (ours)": 0.0,
    }


def test_names_are_escaped_in_html(tmp_path: Path) -> None:
    entry = row("PrefillShare", "x--last_token", decoder="<script>")
    page = html(compare([write_run(tmp_path, [(entry, "1")])]), [])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_the_command_writes_table_page_and_plots(tmp_path: Path) -> None:
    ratios = [
        (
            row(
                "naive" if r else "Full-FT",
                f"sft--ratio_{r}",
                boundary=f"ratio:{r}" if r else None,
                sharing_ratio=float(r),
            ),
            verdicts,
        )
        for r, verdicts in ((0, "111"), (0.5, "110"), (1, "000"))
    ]
    run = write_run(tmp_path / "run", ratios)
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["compare", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "naive at ratio 0.5 (sft)" in result.output
    for name in ("scores", "sharing_ratio"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
    assert 'src="sharing_ratio.svg"' in (out / "comparison.html").read_text()
    assert (out / "comparison.md").read_text() in result.output
    assert not plot_sharing(compare([write_run(tmp_path / "one", ratios[:1])]), out)


def test_the_command_tells_a_users_error_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(tmp_path)])
    assert result.exit_code == 2
    assert "no summary.json" in result.output


def test_an_answer_may_hold_what_ends_a_line_of_text(tmp_path: Path) -> None:
    said = "a\u2028b\x85c\u2029d\x0b\x1ce"
    record = {"item_id": "1", "request_sha256": "p", "correct": True, "output": said}
    run = write_run(tmp_path, [(row("base", "base--self", boundary=None), "1")])
    folder = RunFolder(run)
    folder.write_verdicts("sums", "base--self", [record])
    folder.add_outputs("sums", [record])
    assert folder.verdicts("sums", "base--self") == {"1": record}
    assert folder.outputs("sums") == [record]
    assert compare([run]).results[0].verdicts == {("1", "p"): True}


def test_only_the_rows_own_items_are_paired(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        [
            (row("base", "base--self", boundary=None), "0000000"),
            (row("PrefillShare", "ours--last_token"), "1111111"),
        ],
    )
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    for result in summary["results"]:  # as `--limit 2` leaves them after a longer start
        result["n"] = 2
    path.write_text(json.dumps(summary))
    ((_, _, _, test),) = compare([run]).paired
    assert test.n == 2


def test_results_of_different_settings_are_not_tested_against_each_other(tmp_path: Path) -> None:
    base = [(row("base", "base--self", boundary=None), "00")]
    ours = [(row("PrefillShare", "ours--last_token"), "11")]
    first = write_run(tmp_path / "a", base, settings={"timeout": 3, "sandbox": "namespaces"})
    second = write_run(tmp_path / "b", ours, settings={"timeout": 3, "sandbox": "limits"})
    third = write_run(tmp_path / "c", ours, settings={"timeout": 9, "template": "long" * 50})
    assert len(compare([first, second]).paired) == 1
    comparison = compare([first, third])
    assert comparison.paired == []
    (note,) = comparison.notes
    assert "made with different settings (template; timeout 3 and 9)" in note


def test_results_without_a_common_request_are_said_so(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", [(row("base", "base--self", boundary=None), "00")])
    second = write_run(tmp_path / "b", [(row("PrefillShare", "ours--last_token"), "11")])
    path = second / "items" / "sums" / "ours--last_token.jsonl"
    path.write_text(path.read_text().replace('"p"', '"q"'))
    comparison = compare([first, second])
    assert comparison.paired == []
    assert any("have no request in common" in note for note in comparison.notes)


def test_an_unfinished_evaluation_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, [(row("base", "base--self", boundary=None), "00")])
    path = run / "summary.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(EvaluationError, match="did not finish every task"):
        compare([run])


def edit_summary(folder: Path, **changes: Any) -> Path:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_two_bases_are_two_rows(tmp_path: Path) -> None:
    runs = []
    for name, verdicts in (("small", "00"), ("large", "11")):
        entries = [
            (row("base", "base--self", boundary=None, prefill="self"), verdicts),
            (row("PrefillShare", f"{name}--last_token"), verdicts),
        ]
        about = {"base": {"id": f"org/{name}"}, "run": {"base_fingerprint": f"sha256:{name}"}}
        runs.append(edit_summary(write_run(tmp_path / name, entries), **about))
    comparison = compare(runs)
    assert comparison.names == [
        "base (org/large)",
        "base (org/small)",
        "PrefillShare (large)",
        "PrefillShare (small)",
    ]
    assert {(a, b) for _, a, b, _ in comparison.paired} == {
        ("base (org/small)", "PrefillShare (small)"),
        ("base (org/large)", "PrefillShare (large)"),
    }
    assert "| base (org/large) | 100.0 [" in markdown(comparison)
    for run in runs:  # as earlier versions left them
        edit_summary(run, base={})
    assert compare(runs).names[:2] == ["base (sha256:large)", "base (sha256:small)"]


def test_two_bases_under_one_name_are_not_one_row(tmp_path: Path) -> None:
    """Also where each was evaluated on a benchmark of its own."""
    runs = []
    for name in ("small", "large"):
        entry = row("base", "base--self", boundary=None, task=f"task of {name}")
        about = {"base": {"id": name}, "run": {"base_fingerprint": name}}
        runs.append(edit_summary(write_run(tmp_path / name, [(entry, "01")]), **about))
    assert compare(runs).names == ["base (large)", "base (small)"]


def test_two_styles_are_two_rows_and_other_tasks_stay_one(tmp_path: Path) -> None:
    runs = []
    for style, verdicts in (("chat_template", "00"), ("prompting", "11")):
        entries = [(row("base", "base--self", boundary=None), verdicts)]
        runs.append(write_run(tmp_path / style, entries, settings={"style": style}))
    other = row("base", "base--self", boundary=None, task="words")
    runs.append(write_run(tmp_path / "other", [(other, "01")]))
    names = ["base", "base (chat_template)", "base (prompting)"]
    assert sorted(compare(runs).names) == names


def test_two_results_of_one_base_can_be_renamed(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, [(row("base", f"{name}--self", boundary=None), verdicts)])
        for name, verdicts in (("base", "10"), ("again", "01"))
    ]
    assert sorted(compare(runs).names) == ["base", "base (again)"]
    other = write_run(tmp_path / "c", [(row("base", "base--self", boundary=None), "01")])
    with pytest.raises(EvaluationError, match="name=base"):
        compare([runs[0], other])


def test_what_the_shared_prefill_saved_is_in_table_and_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, [(row("PrefillShare", "ours--last_token"), "10")])
    saved = {"base_tokens": 1200, "base_tokens_if_apart": 3600, "saved_share": 2 / 3}
    nothing = {"base_tokens": 7, "base_tokens_if_apart": 7, "saved_share": 0.0}
    edit_summary(run, shared_prefill={"sums": saved, "words": nothing})
    comparison = compare([run])
    for text in (markdown(comparison), html(comparison, [])):
        assert "the base ran 1,200 prompt tokens in place of 3,600 (67% saved)" in text
        assert "words" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"results": [{"task": "sums"}]}, r"summary\.json: results\[0\]: decoder, label, prefill"),
        ({"tasks": {}}, r"summary\.json: tasks: sums missing"),
        ({"tasks": {"sums": {}}}, r"summary\.json: tasks\[sums\]: settings, notes missing"),
    ],
)
def test_a_summary_that_lacks_something_is_told(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path, [(row("base", "base--self", boundary=None), "1")])
    with pytest.raises(EvaluationError, match=message):
        compare([edit_summary(run, **changes)])


def test_damaged_files_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, [(row("base", "base--self", boundary=None), "11")])
    items = run / "items" / "sums" / "base--self.jsonl"
    items.write_text(items.read_text().splitlines()[0] + "\n{}\n")
    with pytest.raises(EvaluationError, match=r"base--self\.jsonl:2: item_id, .* missing"):
        compare([run])
    (run / "summary.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"summary\.json: not JSON"):
        compare([run])
