"""Linear layers of decoding steps give what `nn.Linear` gives, over the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.families import FAMILIES, build
from torch import nn

from prefillshare_train.core import few_rows
from prefillshare_train.core.few_rows import MOST_ROWS, FewRowsLinear, use_few_rows


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, MOST_ROWS + 2),
    tokens=st.integers(1, 3),
    width=st.integers(1, 40),
    out=st.integers(1, 40),
    bias=st.booleans(),
    turned=st.booleans(),
)
def test_the_sums_are_those_of_linear(
    batch: int, tokens: int, width: int, out: int, bias: bool, turned: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(width, out, bias=bias)
    x = torch.randn(batch, tokens, width)
    if turned:  # rows that do not lie one after another
        x = torch.randn(width, tokens, batch).permute(2, 1, 0)
    with torch.no_grad():
        found = FewRowsLinear(layer)(x)
        torch.testing.assert_close(found, layer(x), atol=1e-5, rtol=1e-5)
    assert found.is_contiguous()


def test_a_row_does_not_depend_on_the_rows_beside_it_being_numbers() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    spoilt = x.clone()
    spoilt[1] = float("inf")
    with torch.no_grad():
        expected, found = few_rows.linear(x, weight), few_rows.linear(spoilt, weight)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_go_the_usual_way(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(few_rows.linear(x, weight), F.linear(x, weight))


def test_a_gradient_goes_the_usual_way() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8, requires_grad=True)
    few_rows.linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_keeps_its_weights_and_its_tie(family: str) -> None:
    model = build(family, torch.float32).cpu()
    ids = torch.arange(1, 6)[None]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names, places = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        use_few_rows(model)
        assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {FewRowsLinear}
        torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)
    assert list(model.state_dict()) == names
    assert [p.data_ptr() for p in model.parameters()] == places
    kept = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert kept == tied
    assert not model.get_output_embeddings().training
