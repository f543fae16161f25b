"""SmolLM2-135M: the oracles on a model that people use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.core.conversations import packed_loss, prefill_batch
from transformers import AutoTokenizer, PreTrainedModel

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.generate import generate
from prefillshare_train.core.modules import PrefillModule, load_causal_lm
from prefillshare_train.core.packing import pack
from prefillshare_train.core.spans import Conversation, Turn

MODEL = Path(__file__).resolve().parents[2] / ".cache/models/smollm2-135m-instruct"
TEXTS = ("The capital of France is", "def add(a, b):\n    return", "Water boils at 100")

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    if not (MODEL / "model.safetensors").is_file():
        pytest.skip("the base model is not there: run `make model`")
    return load_causal_lm(str(MODEL), dtype=torch.float32).eval()


def test_the_base_as_decoder_has_the_ordinary_loss_and_answers(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    prefill = PrefillModule(model)
    cache = prefill.prefill([ids[:-1] for ids in rows])
    answers = generate(model, cache, rows, max_new_tokens=8, stop_ids=())
    conversations = [
        Conversation((*ids, *answer), (Turn(len(ids), len(ids) + 8),))
        for ids, answer in zip(rows, answers, strict=True)
    ]
    batch = pack(conversations, BoundaryRule.parse("last_token"))
    loss = packed_loss(model, batch, prefill_batch(prefill, batch))
    model.set_attn_implementation("sdpa")
    expected = torch.zeros(())
    for ids, answer in zip(rows, answers, strict=True):
        whole = torch.tensor([[*ids, *answer]])
        with torch.no_grad():
            logits = model(whole).logits[0, len(ids) - 1 : -1]
        expected += F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        assert logits.argmax(-1).tolist() == answer, "greedy answers are the model's own"
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-4)
