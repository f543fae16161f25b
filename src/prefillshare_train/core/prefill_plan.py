"""How the base runs a packed row of prompts: what once for several prompts, and how much at a time.

The row keeps every prompt end to end, since that is what decoders read. A plan says which of its
tokens are run, pass by pass: the beginning that several prompts share is run for one of them and
its K/V copied to the others, and a pass takes no more tokens than memory allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from prefillshare_train.core.layout import Segment, SegmentGroup, group_segments
from prefillshare_train.core.prompt_cache import PromptCache


@dataclass(frozen=True, slots=True)
class PrefillPass:
    """One forward pass over some stretches of the packed row.

    Attributes:
        spans: `(start, stop)` of each stretch, in the order in which they are run.
        groups: the stretches as segments; the past of each is its own prompt's beginning.
        copies: `(source, target, length)` of K/V that other prompts take over once recorded.
    """

    spans: tuple[tuple[int, int], ...]
    groups: tuple[SegmentGroup, ...]
    copies: tuple[tuple[int, int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that the pass runs."""
        return sum(stop - start for start, stop in self.spans)

    def index(self) -> list[int]:
        """Offset in the row of each token of the pass."""
        return [i for start, stop in self.spans for i in range(start, stop)]


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The passes over one packed row.

    Attributes:
        passes: in order; together they leave K/V at every position of the row.
        row_tokens: tokens of the row.
    """

    passes: tuple[PrefillPass, ...]
    row_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that the base runs, those of shared beginnings once."""
        return sum(one.tokens for one in self.passes)

    @property
    def shared_tokens(self) -> int:
        """Tokens of the row whose K/V are another prompt's."""
        return self.row_tokens - self.tokens

    @property
    def is_plain(self) -> bool:
        """One pass runs the row as it lies."""
        return len(self.passes) <= 1 and not self.shared_tokens


@dataclass
class _Stretch:
    """A stretch of one prompt still to be run."""

    prompt: int
    begin: int  # position in the prompt
    end: int
    copies: list[tuple[int, int]] = field(default_factory=list)  # (prompt, length) that take over


def plan_prefill(
    prompts: Sequence[Sequence[int]],
    *,
    share_from: int | None = None,
    chunk_tokens: int | None = None,
) -> PrefillPlan:
    """Plan the base's passes over prompts that lie end to end.

    Args:
        prompts: token ids of each prompt; empty ones are allowed.
        share_from: run a beginning that prompts have in common once, where it has at least this
            many tokens; None never does.
        chunk_tokens: most tokens that one pass may run; None for no limit.
    """
    starts, total = [], 0
    for prompt in prompts:
        starts.append(total)
        total += len(prompt)
    first, second = _levels(prompts, share_from)
    passes = [
        _as_pass(chunk, starts)
        for level in (first, second)
        for chunk in _chunks(level, chunk_tokens)
    ]
    return PrefillPlan(tuple(passes), total)


def _levels(
    prompts: Sequence[Sequence[int]], share_from: int | None
) -> tuple[list[_Stretch], list[_Stretch]]:
    """What is run at once, and what waits for K/V that the first level shares."""
    taken: dict[int, tuple[int, int]] = {}  # prompt -> (owner, length)
    if share_from is not None:
        for members, length in _clusters(prompts, share_from):
            owner = min(members)
            taken.update({m: (owner, length) for m in members if m != owner})
    owned: dict[int, list[tuple[int, int]]] = {}
    for member, (owner, length) in sorted(taken.items()):
        owned.setdefault(owner, []).append((member, length))
    first = [
        _Stretch(i, 0, len(prompt), owned.get(i, []))
        for i, prompt in enumerate(prompts)
        if prompt and i not in taken
    ]
    second = [
        _Stretch(i, length, len(prompts[i]))
        for i, (_, length) in sorted(taken.items())
        if length < len(prompts[i])
    ]
    return first, second


def _clusters(prompts: Sequence[Sequence[int]], share_from: int) -> Iterator[tuple[list[int], int]]:
    """Groups of prompts with a common beginning, and its length.

    Neighbours in lexicographic order share most. A prompt joins the group before it where the group
    then saves at least as many tokens.
    """
    texts = [tuple(prompt) for prompt in prompts]
    order = sorted((i for i, text in enumerate(texts) if text), key=lambda i: texts[i])
    group: list[int] = []
    length = 0
    for current in order:
        common = _common(texts[group[-1]], texts[current]) if group else 0
        joined = common if len(group) < 2 else min(length, common)
        if group and joined >= share_from and len(group) * joined >= (len(group) - 1) * length:
            group.append(current)
            length = joined
            continue
        if len(group) > 1:
            yield group, length
        group, length = [current], 0
    if len(group) > 1:
        yield group, length


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common beginning, by bisection (slices compare at C speed)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _chunks(stretches: list[_Stretch], limit: int | None) -> Iterator[list[_Stretch]]:
    """Stretches in order, cut into passes of at most `limit` tokens."""
    chunk: list[_Stretch] = []
    room = limit
    for stretch in stretches:
        begin = stretch.begin
        while begin < stretch.end:
            end = stretch.end if room is None else min(stretch.end, begin + room)
            chunk.append(_Stretch(stretch.prompt, begin, end, stretch.copies))
            if room is not None:
                room -= end - begin
                if not room:
                    yield chunk
                    chunk, room = [], limit
            begin = end
    if chunk:
        yield chunk


def _as_pass(chunk: list[_Stretch], starts: Sequence[int]) -> PrefillPass:
    spans, segments, copies = [], [], []
    for one in chunk:
        start = starts[one.prompt]
        spans.append((start + one.begin, start + one.end))
        segments.append(Segment(one.end - one.begin, start, one.begin))
        for prompt, length in one.copies:
            end = min(one.end, length)
            if one.begin < end:
                copies.append((start + one.begin, starts[prompt] + one.begin, end - one.begin))
    return PrefillPass(tuple(spans), group_segments(segments), tuple(copies))


class PassRecorder:
    """Receives the K/V of one pass of a plan and puts them where they lie in the row.

    Args:
        cache: of the whole row; filled pass by pass, and the past of later ones.
        one: the pass.
    """

    def __init__(self, cache: PromptCache, one: PrefillPass) -> None:
        self._cache = cache
        self._pass = one

    def record(self, layer: int, key: Tensor, value: Tensor) -> None:
        """As `PromptCache.record`, for (1, H_kv, T, D) of the pass's tokens."""
        cache = self._cache
        if layer == len(cache.keys):
            for kept in (cache.keys, cache.values):
                shape = (value.shape[1], cache.tokens, value.shape[3])
                kept.append(value.new_empty(shape, device=cache.device or value.device))
        for row, new in ((cache.keys[layer], key), (cache.values[layer], value)):
            offset = 0
            for start, stop in self._pass.spans:
                row[:, start:stop] = new[0, :, offset : offset + stop - start].detach()
                offset += stop - start
            for source, target, length in self._pass.copies:
                row[:, target : target + length] = row[:, source : source + length]
