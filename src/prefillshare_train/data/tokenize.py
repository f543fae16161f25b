"""From rows to token ids and the spans of their trained turns.

Of every trained assistant turn t, the prompt is the template's rendering of the messages before it
with the generation prompt, and the response is what the rendering of the messages up to it adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from prefillshare_train.core.spans import Conversation, Turn
from prefillshare_train.data.errors import DataError, SeamError
from prefillshare_train.data.rendering import Renderer, RenderError
from prefillshare_train.data.rows import Message, Row
from prefillshare_train.data.template_checks import ToolChecks, reasoning_left_out

DropReason = Literal[
    "no_trained_turn", "no_prompt", "template_error", "seam_mismatch", "empty_response", "overlong"
]
Note = Literal["no_end_token", "eos_appended", "end_token_inside_response", "reasoning_left_out"]
_TAIL = 12
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Drop:
    """A row that cannot be trained on, and why."""

    row: Row
    reason: DropReason
    detail: str


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A row as conversations.

    Attributes:
        row: where it comes from.
        conversations: one, or one a turn where the template rewrites history.
        targets: the message of each turn, in the order of the conversations' turns.
        rewrites_history: later prompts differ from the running text.
        dropped_turns: turns left out because they end past the maximum length.
        notes: peculiarities of its turns, once a turn.
    """

    row: Row
    conversations: tuple[Conversation, ...]
    targets: tuple[Message, ...]
    rewrites_history: bool = False
    dropped_turns: int = 0
    notes: tuple[Note, ...] = ()


@dataclass(slots=True)
class _TurnText:
    message: Message
    prompt: str
    bare: str
    full: str


@dataclass(slots=True)
class _TurnIds:
    message: Message
    full: list[int]
    turn: Turn
    notes: list[Note] = field(default_factory=list)


class RowTokenizer:
    """Tokenizes rows with one renderer; keeps what is equal from row to row."""

    def __init__(
        self,
        renderer: Renderer,
        *,
        max_length: int,
        train_on: Literal["all_turns", "last_turn"] = "all_turns",
    ) -> None:
        """Args: `max_length` in tokens of prompt and response together."""
        self._renderer = renderer
        self._max_length = max_length
        self._train_on = train_on
        self._ends = frozenset(renderer.end_token_ids)
        self._blank: dict[int, bool] = {}
        # Python makes a new object of every larger int; conversations share these instead.
        # Vocabularies may have holes, so that the highest id is not their size.
        self._shared_ids = list(range(max(renderer.tokenizer.get_vocab().values()) + 1))
        self._checks = ToolChecks(renderer)

    def tokenize(self, rows: Sequence[Row]) -> Iterator[TokenizedRow | Drop]:
        """One result a row, in order.

        Raises:
            DataError: the template ignores tools or tool calls, or starts prompts with two BOS:
                a fault of the recipe and not of a row.
        """
        for start in range(0, len(rows), _BATCH):
            planned = [(row, self._plan(row)) for row in rows[start : start + _BATCH]]
            texts = list(
                dict.fromkeys(
                    text
                    for _, plan in planned
                    if not isinstance(plan, Drop)
                    for turn in plan
                    for text in (turn.prompt, turn.full)
                )
            )
            ids = dict(zip(texts, self._renderer.encode(texts), strict=True))
            for row, plan in planned:
                yield plan if isinstance(plan, Drop) else self._assemble(row, plan, ids)

    def _plan(self, row: Row) -> list[_TurnText] | Drop:
        messages = self._renderer.with_system_prompt(row.messages)
        trained = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight", 1)
        ]
        if self._train_on == "last_turn":
            trained = trained[-1:]
        if not trained:
            return Drop(row, "no_trained_turn", "no assistant message with a weight other than 0")
        if trained[0] == 0:
            return Drop(
                row,
                "no_prompt",
                f"the assistant speaks first: {messages[0]['content'][:80]!r}. Remove the message, "
                "give it weight: 0, or set data.system_prompt",
            )
        try:
            turns = [self._turn_text(messages, index, row) for index in trained]
            self._checks.tools(row, messages[: trained[0]], turns[0].prompt)
            self._checks.calls(row, messages[: trained[-1] + 1])
            for turn in turns:
                self._checks.target(row, turn.message, turn.prompt, turn.full)
        except RenderError as error:
            return Drop(row, "template_error", str(error))
        return turns

    def _turn_text(self, messages: list[Message], index: int, row: Row) -> _TurnText:
        def render(until: int, generation: bool) -> str:
            return self._renderer.text(
                messages[:until], row.tools, add_generation_prompt=generation
            )

        return _TurnText(
            messages[index], render(index, True), render(index, False), render(index + 1, False)
        )

    def _assemble(
        self, row: Row, plan: list[_TurnText], ids: dict[str, list[int]]
    ) -> TokenizedRow | Drop:
        turns = []
        for text in plan:
            try:
                turn = self._turn_ids(row, text, ids[text.prompt], ids[text.full])
            except SeamError as error:
                return Drop(row, "seam_mismatch", f"{error.found}. {error.fix}")
            if turn is None:
                return Drop(row, "empty_response", repr(text.full[-200:]))
            turns.append(turn)
        prompts = [ids[text.prompt] for text in plan]
        rewrites = any(
            prompt[: turn.turn.end] != turn.full[: turn.turn.end]
            for turn, prompt in zip(turns, prompts[1:], strict=False)
        )
        kept = [turn for turn in turns if turn.turn.end <= self._max_length]
        if not kept:
            first = turns[0].turn
            detail = f"prompt of {first.prompt_length} and response of " + (
                f"{first.end - first.prompt_length} tokens exceed max_length {self._max_length}; "
                f"the response begins {plan[0].full[len(plan[0].prompt) :][:80]!r}"
            )
            return Drop(row, "overlong", detail)
        groups = [[turn] for turn in kept] if rewrites else [kept]
        return TokenizedRow(
            row,
            tuple(self._conversation(group) for group in groups),
            tuple(turn.message for turn in kept),
            rewrites_history=rewrites,
            dropped_turns=len(turns) - len(kept),
            notes=tuple(note for turn in kept for note in turn.notes),
        )

    def _conversation(self, turns: list[_TurnIds]) -> Conversation:
        last = turns[-1]
        tokens = last.full[: last.turn.end]
        return Conversation(
            tuple(map(self._shared_ids.__getitem__, tokens)), tuple(turn.turn for turn in turns)
        )

    def _turn_ids(
        self, row: Row, text: _TurnText, prompt: list[int], full: list[int]
    ) -> _TurnIds | None:
        bos = self._renderer.tokenizer.bos_token_id
        if bos is not None and prompt[:2] == [bos, bos]:
            raise DataError(
                f"{row.origin}: prompts start with two BOS tokens: "
                f"{self._renderer.decode(prompt[:8])!r}. Write bos_token once in the template "
                f"{self._renderer.name}"
            )
        if not prompt or full[: len(prompt)] != prompt:
            raise self._seam_error(row, prompt, full)
        notes: list[Note] = []
        end, closed = self._response_end(full, len(prompt))
        if not closed and self._renderer.kind == "prompt_template":
            full = [*full, self._renderer.tokenizer.eos_token_id]
            end, closed = len(full), True
            notes.append("eos_appended")
        elif not closed:
            notes.append("no_end_token")
        answer = full[len(prompt) : end - closed]
        if all(self._is_blank(token) for token in answer):
            return None
        if not self._ends.isdisjoint(answer):
            notes.append("end_token_inside_response")
        if reasoning_left_out(text.message, text.full[len(text.prompt) :]):
            notes.append("reasoning_left_out")
        header = self._renderer.header_length(text.bare, text.prompt, prompt)
        return _TurnIds(text.message, full, Turn(len(prompt), end, header), notes)

    def _response_end(self, full: list[int], prompt_length: int) -> tuple[int, bool]:
        """End of the response, and whether an end-of-turn token closes it.

        What follows that token (a newline; Phi-3's EOS after the last turn) is never generated.
        """
        end = None
        for position in range(len(full) - 1, prompt_length - 1, -1):
            if full[position] in self._ends:
                end = position + 1
            elif not self._is_blank(full[position]):
                break
        return (len(full), False) if end is None else (end, True)

    def _is_blank(self, token: int) -> bool:
        blank = self._blank.get(token)
        if blank is None:
            blank = self._blank[token] = not self._renderer.decode([token]).strip()
        return blank

    def _seam_error(self, row: Row, prompt: list[int], full: list[int]) -> SeamError:
        same = 0
        for left, right in zip(prompt, full, strict=False):
            if left != right:
                break
            same += 1
        start = max(0, same - _TAIL)
        decode = self._renderer.decode
        return SeamError(
            row.origin,
            f"the prompt's tokens are not a prefix of the prompt-and-response's: they part at "
            f"token {same} of {len(prompt)}; the prompt has there "
            f"{decode(prompt[start : same + _TAIL])!r}, the prompt-and-response "
            f"{decode(full[start : same + _TAIL])!r}",
            "Use a template whose generation prompt ends in a token that cannot merge with the "
            "response, and that renders the last assistant message as it is generated",
        )
