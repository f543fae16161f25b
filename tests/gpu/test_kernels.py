"""FlashAttention over packed rows, and Liger's loss, against float64 on the same card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prefillshare_train.core import kernels
from prefillshare_train.core.flash import flash_can_run
from prefillshare_train.core.layout import Segment, group_segments
from prefillshare_train.core.loss import LogitTransform, linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ROWS = {
    "prompts": [Segment(70), Segment(70), Segment(3), Segment(130)],
    "responses": [Segment(9, 0, 70), Segment(40, 70, 70), Segment(1, 140, 3), Segment(5, 143, 130)],
    "out of order, one without a past": [Segment(7, 100, 90), Segment(20, 0, 33), Segment(12)],
}
PAST = 273


def far(found: Tensor, expected: Tensor) -> float:
    """Relative distance."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("width", [64, 128, 24])
@pytest.mark.parametrize("name", ROWS)
def test_flash_equals_float64(name: str, width: int, window: int | None) -> None:
    torch.manual_seed(0)
    groups = group_segments(ROWS[name])
    tokens = groups[-1].query_end

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, width, device="cuda", dtype=torch.float64)

    past = None if name == "prompts" else (draw(2, PAST), draw(2, PAST))
    inputs = [draw(1, 6, tokens), draw(1, 2, tokens), draw(1, 2, tokens)]
    upstream = draw(1, tokens, 6)

    def run(dtype: torch.dtype) -> list[Tensor]:
        mine = [t.to(dtype).requires_grad_() for t in inputs]
        held = None if past is None else tuple(t.to(dtype) for t in past)
        assert flash_can_run(mine[0], mine[2], None) == (dtype == torch.bfloat16)
        output = kernels.attend_segments(
            *mine,
            groups,
            held,
            scaling=0.2,
            sliding_window=window,  # type: ignore[arg-type]
        )
        output.backward(upstream.to(dtype))
        return [output.detach(), *(t.grad for t in mine if t.grad is not None)]

    for found, expected in zip(run(torch.bfloat16), run(torch.float64), strict=True):
        assert far(found, expected) < 1e-2


def test_grouped_heads_do_not_fall_back_to_writing_all_scores_out() -> None:
    heads, kv_heads, tokens, past = 16, 8, 64, 8192
    query = torch.randn(heads, 1, tokens, 128, device="cuda", requires_grad=True)
    key, value = (torch.randn(kv_heads, 1, tokens, 128, device="cuda") for _ in range(2))
    held = tuple(torch.randn(kv_heads, 1, past, 128, device="cuda") for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kernels._attend_sdpa(query, key, value, held, 0.1, 0.0, None, None)  # type: ignore[arg-type]
    # The keys and values once joined and once for every query head; the scores are as much again.
    joined = 2 * (kv_heads + heads) * (past + tokens) * 128 * 4
    assert torch.cuda.max_memory_allocated() - before < 1.25 * joined


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ligers_loss_equals_our_own(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    torch.manual_seed(0)
    head = nn.Linear(256, 1000, bias=False, device="cuda")
    rows = torch.randn(600, 256, device="cuda")
    labels = torch.randint(0, 1000, (600,), device="cuda")

    def run() -> list[Tensor]:
        hidden = rows.clone().requires_grad_()
        head.zero_grad()
        nll = linear_cross_entropy(hidden, head, labels, LogitTransform(softcap=softcap)).nll
        nll.backward()
        assert hidden.grad is not None
        assert head.weight.grad is not None
        return [nll.detach(), hidden.grad, head.weight.grad.clone()]

    fused = run()
    monkeypatch.setattr("prefillshare_train.core.loss._liger_loss", lambda *_: None)
    for found, expected in zip(fused, run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)
