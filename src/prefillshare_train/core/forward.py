"""A causal LM's forward, taught to take packed rows.

Wrappers (PEFT, DDP, FSDP, DeepSpeed) do their work around a model's own forward, so what a step
needs is done inside it.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefillshare_train.core.attention import JOB_KEYWORD
from prefillshare_train.core.loss import LogitTransform, LossSums, linear_cross_entropy

_LOSS_HEAD = "_prefillshare_loss_head"


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or the model itself.

    Raises:
        TypeError: it is neither.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            f"expected a transformers causal LM or a PeftModel around one, found "
            f"{type(model).__name__}"
        )
    return inner


def run_backbone(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, job: Any
) -> Tensor:
    """Run the decoder stack below the LM head under an attention job.

    Args:
        input_ids, position_ids: (B, T) int64.

    Returns:
        Hidden states after the final norm, (B, T, D).
    """
    # transformers returns a 4-D mask untouched, so no mask is built that the job would ignore.
    unread_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device)
    output = model.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=unread_mask,
        use_cache=False,
        **{JOB_KEYWORD: job},
    )
    return output.last_hidden_state


def attach_loss_head(model: nn.Module) -> None:
    """Teach a causal LM's forward to take a packed row and return loss sums.

    `model(input_ids, position_ids, labels, target_index=..., prefillshare_job=...)` then returns a
    dict of `nll` and `correct` (see `loss.LossSums`), and with `record_only=True` the stack runs
    for the K/V that the job records and nothing is returned. Any other call is untouched. It is
    done on the instance; calling it twice is harmless.
    """
    causal_lm = causal_lm_of(model)
    if getattr(causal_lm, _LOSS_HEAD, False):
        return
    bound = causal_lm.forward
    # Unbound where it can be, so that a deep copy of the model runs its own weights.
    plain_forward = getattr(bound, "__func__", lambda _, *args, **kwargs: bound(*args, **kwargs))
    transform = LogitTransform.of(causal_lm.config)

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        *args: Any,
        target_index: Tensor | None = None,
        count_correct: bool = False,
        record_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        if record_only:
            assert input_ids is not None
            run_backbone(self, input_ids, kwargs["position_ids"], kwargs[JOB_KEYWORD])
            return {}
        if target_index is None:
            return plain_forward(self, input_ids, *args, **kwargs)
        assert input_ids is not None
        job = kwargs[JOB_KEYWORD]
        hidden = run_backbone(self, input_ids, kwargs["position_ids"], job)
        sums: LossSums = linear_cross_entropy(
            hidden[0, target_index[0]],
            self.get_output_embeddings(),
            kwargs["labels"][0],
            transform,
            count_correct=count_correct,
        )
        return {"nll": sums.nll, "correct": sums.correct}

    causal_lm.forward = MethodType(forward, causal_lm)
    setattr(causal_lm, _LOSS_HEAD, True)
