"""A made-up benchmark for trying the evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefillshare_train.evaluation.run import Limits
from prefillshare_train.evaluation.task import EvalItem, Judged, Verdict

STOP = "7"  # said now and then by lively models
LIMITS = Limits(batch_size=3, prefill_tokens=60)


class Vowels:
    """A benchmark whose answers are right where they hold an even number of vowels."""

    name = "vowels"
    notes = ("Made up.",)

    def __init__(self, count: int = 7, stop: str = STOP, **settings: Any) -> None:
        self.settings = {"version": 1, **settings}
        self.stop = stop
        self.count = count
        self.judged: list[str] = []

    def items(self) -> list[EvalItem]:
        return [
            EvalItem(
                f"v/{n}",
                ({"role": "user", "content": "Say " + "so " * n + "on"},),
                response_prefix="Well" if n % 2 else "",
                stop=(self.stop,),
                max_new_tokens=4 + n,
            )
            for n in range(self.count)
        ]

    def judge(
        self, items: Sequence[EvalItem], outputs: Sequence[str], judged: Judged
    ) -> list[Verdict]:
        verdicts = []
        for item, output in zip(items, outputs, strict=True):
            count = sum(letter in "aeiou" for letter in output)
            verdicts.append(Verdict(count % 2 == 0, str(count)))
            judged(item, verdicts[-1])
            self.judged.append(item.item_id)
        return verdicts
