"""What became of the data: counts, drops with their reasons, lengths."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefillshare_train.core.spans import Conversation
from prefillshare_train.data.errors import DataError
from prefillshare_train.data.sources import LoadedRows
from prefillshare_train.data.tokenize import Drop, TokenizedRow

_EXAMPLES = 3
_BINS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_MEANINGS = {
    "no_trained_turn": "no assistant turn to train",
    "no_prompt": "nothing stands before the first trained turn",
    "template_error": "refused by the template",
    "seam_mismatch": "prompt tokens are not a prefix of the full tokens",
    "empty_response": "the template renders the answer as nothing",
    "overlong": "longer than max_length",
    "no_end_token": "turns that no end-of-turn token closes: the decoder will not learn to stop",
    "eos_appended": "turns that EOS was appended to",
    "end_token_inside_response": "turns with an end-of-turn token inside the response",
    "reasoning_left_out": "turns whose reasoning the template leaves out: it is not trained",
}


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths in tokens.

    Attributes:
        histogram: `(upper bound, count)` in powers of two; a length equal to the bound is in it.
    """

    count: int
    total: int
    minimum: int
    p50: int
    p90: int
    p99: int
    maximum: int
    histogram: list[tuple[int, int]]

    @classmethod
    def of(cls, values: Iterable[int]) -> Lengths:
        """The distribution of some values; all zero where there are none."""
        ordered = sorted(values)
        if not ordered:
            return cls(0, 0, 0, 0, 0, 0, 0, [])
        size = len(ordered)
        # Nearest rank: the smallest value that the share of values does not exceed.
        at = {share: ordered[-(-size * share // 100) - 1] for share in (50, 90, 99)}
        bounds = [*_BINS, max(ordered[-1], _BINS[-1] + 1)]
        counts = Counter(next(bound for bound in bounds if value <= bound) for value in ordered)
        return cls(
            size, sum(ordered), ordered[0], at[50], at[90], at[99], ordered[-1],
            sorted(counts.items()),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.p50} / {self.p90} / {self.p99} / {self.maximum}"


@dataclass
class DropSummary:
    """Rows dropped for one reason, with the first few: `(origin, detail)`."""

    count: int = 0
    examples: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class SourceReport:
    """From the rows of one source to tokenized rows.

    Attributes:
        rows_read: rows in the source.
        rows_filtered: rows that its format leaves out.
        rows: rows tokenized, after sampling.
        drops: rows dropped, by reason.
        dropped_turns: turns past max_length of rows that were kept.
        history_rewritten: rows whose template rewrites history, trained one example a turn.
        history_rewritten_turns: the examples they became.
        duplicates: rows that equal an earlier one.
        notes: peculiarities of turns that were kept.
        unread_columns: columns that hold something and that the format does not read.
    """

    source: str
    format: str
    rows_read: int
    rows_filtered: int
    rows: int
    drops: dict[str, DropSummary] = field(default_factory=dict)
    dropped_turns: int = 0
    history_rewritten: int = 0
    history_rewritten_turns: int = 0
    duplicates: int = 0
    notes: dict[str, int] = field(default_factory=dict)
    unread_columns: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: str, loaded: LoadedRows) -> SourceReport:
        """A report before tokenization."""
        return cls(
            source,
            loaded.format,
            loaded.rows_read,
            loaded.filtered,
            len(loaded.rows),
            unread_columns=list(loaded.unread),
        )

    def add(self, result: TokenizedRow | Drop) -> None:
        """Count one tokenized row."""
        if isinstance(result, Drop):
            summary = self.drops.setdefault(result.reason, DropSummary())
            summary.count += 1
            if len(summary.examples) < _EXAMPLES:
                summary.examples.append((result.row.origin, result.detail))
            return
        self.dropped_turns += result.dropped_turns
        if result.rewrites_history:
            self.history_rewritten += 1
            self.history_rewritten_turns += len(result.conversations)
        for note in result.notes:
            self.notes[note] = self.notes.get(note, 0) + 1

    def require_rows(self) -> None:
        """Raises:
        DataError: every row was dropped; lists the reasons with an example each.
        """
        dropped = sum(drop.count for drop in self.drops.values())
        if dropped == self.rows:
            raise DataError(
                "\n".join([f"all {self.rows} rows of {self.source} were dropped:", *self._drops()])
            )

    def _drops(self) -> list[str]:
        lines = []
        for reason, drop in sorted(self.drops.items(), key=lambda item: -item[1].count):
            lines.append(f"  {drop.count} {reason}: {_MEANINGS[reason]}")
            lines += [f"    {origin}: {detail}" for origin, detail in drop.examples]
        return lines

    def lines(self) -> list[str]:
        """Plain text, one statement a line."""
        head = f"{self.source} ({self.format}): {self.rows_read} rows read"
        if self.rows_filtered:
            head += f", {self.rows_filtered} left out by the format"
        if self.rows != self.rows_read - self.rows_filtered:
            head += f", {self.rows} sampled"
        lines = [head]
        if self.unread_columns:
            lines.append(f"  columns not read: {', '.join(self.unread_columns)}")
        dropped = sum(drop.count for drop in self.drops.values())
        if dropped:
            lines += [f"  {dropped} rows dropped:", *(f"  {line}" for line in self._drops())]
        if self.dropped_turns:
            lines.append(f"  {self.dropped_turns} further turns dropped: longer than max_length")
        if self.history_rewritten:
            lines.append(
                f"  {self.history_rewritten} rows whose template rewrites history, trained as "
                f"{self.history_rewritten_turns} examples of one turn"
            )
        if self.duplicates:
            lines.append(f"  {self.duplicates} duplicates removed")
        lines += [f"  {count} {_MEANINGS[note]}" for note, count in sorted(self.notes.items())]
        return lines


@dataclass(frozen=True)
class SplitReport:
    """Size of what is trained or evaluated on. Lengths and tokens are in tokens."""

    conversations: int
    turns: int
    tokens: int
    response_tokens: int
    lengths: dict[str, Lengths]

    @classmethod
    def of(cls, conversations: Sequence[Conversation]) -> SplitReport:
        """Measure conversations: whole lengths, and every turn's prompt and response."""
        turns = [turn for conversation in conversations for turn in conversation.turns]
        lengths = {
            "conversation": Lengths.of(len(item.token_ids) for item in conversations),
            "prompt": Lengths.of(turn.prompt_length for turn in turns),
            "response": Lengths.of(turn.end - turn.prompt_length for turn in turns),
        }
        return cls(
            conversations=len(conversations),
            turns=len(turns),
            tokens=lengths["conversation"].total,
            response_tokens=lengths["response"].total,
            lengths=lengths,
        )

    def lines(self, name: str) -> list[str]:
        """Plain text, one statement a line."""
        return [
            f"{name}: {self.conversations} conversations, {self.turns} turns, "
            f"{self.tokens} tokens, {self.response_tokens} of them trained",
            *(
                f"  {kind} length (median / 90 % / 99 % / longest): {lengths}"
                for kind, lengths in self.lengths.items()
            ),
        ]


@dataclass(frozen=True)
class DataReport:
    """All that `build_dataset` did.

    Attributes:
        sources: of the training rows, and of the evaluation rows where they have their own.
        train: what is trained on.
        eval: what is evaluated on; None where nothing is.
        eval_overlap: training rows removed because they are also evaluated.
    """

    sources: list[SourceReport]
    train: SplitReport
    eval: SplitReport | None
    eval_overlap: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [line for source in self.sources for line in source.lines()]
        if self.eval_overlap:
            lines.append(f"{self.eval_overlap} training rows removed that are also evaluated")
        lines += self.train.lines("train")
        if self.eval is not None:
            lines += self.eval.lines("eval")
        return "\n".join(lines)
