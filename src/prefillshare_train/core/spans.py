"""Which tokens of a conversation are prompt, header and response.

These types are the meeting point of the data pipeline (which makes them), training (which packs
them) and evaluation; they hold token ids and offsets only, never text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn to train, as offsets into its conversation's token ids.

    `[0, prompt_length)` is the prompt of this turn, exactly as it will be served: everything the
    model has been shown before it speaks. Its last `header_length` tokens are the generation
    prompt (the chat template's assistant header, or a prompt template's suffix); 0 where there is
    none. `[prompt_length, end)` is the response, its end-of-turn token included.
    """

    prompt_length: int
    end: int
    header_length: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length < self.end:
            raise ValueError(
                f"a turn needs a prompt and a response of one token or more; found prompt "
                f"[0, {self.prompt_length}) and response [{self.prompt_length}, {self.end})"
            )
        if not 0 <= self.header_length <= self.prompt_length:
            raise ValueError(
                f"the assistant header has {self.header_length} tokens, "
                f"but its prompt only {self.prompt_length}"
            )


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids of one running text and the turns of it that are trained together.

    Every turn's prompt is a prefix of `token_ids`. A conversation whose template rewrites history
    (so that a later prompt differs from the running text) is held as one `Conversation` a turn.
    """

    token_ids: tuple[int, ...]
    turns: tuple[Turn, ...]

    def __post_init__(self) -> None:
        if not self.turns:
            raise ValueError("a conversation needs at least one turn to train")
        previous_end = 0
        for turn in self.turns:
            if turn.prompt_length < previous_end:
                raise ValueError("turns must be in order and must not overlap")
            previous_end = turn.end
        if previous_end > len(self.token_ids):
            raise ValueError(
                f"the last turn ends at {previous_end}, past the {len(self.token_ids)} tokens"
            )

    @property
    def response_tokens(self) -> int:
        """Number of tokens that carry a loss."""
        return sum(turn.end - turn.prompt_length for turn in self.turns)
