"""The methods that the training benchmark compares: forward and backward of one micro-batch each.

Every method has a model of its own with the same weights, sees the same token ids, and returns its
share of the mean loss over the target tokens of the pass.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from speed_workloads import DEVICE, RANDOM_MODEL, RULE, Case, Workload
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar
from trl import SFTConfig, SFTTrainer

from prefillshare_train.core.modules import causal_lm_of, load_causal_lm
from prefillshare_train.core.spans import Conversation
from prefillshare_train.training.config import CacheConditionedConfig
from prefillshare_train.training.trainer import CacheConditionedTrainer, collate

RunMicroBatch = Callable[[int], float]
IGNORED = -100


def quiet() -> None:
    """Keep the libraries' remarks out of the progress bar."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()  # of loading weights


def build(method: str, case: Case, workload: Workload) -> tuple[nn.Module, RunMicroBatch]:
    """A method's model, and what runs forward and backward of its i-th micro-batch."""
    make = {"sft": _sft, "trl": _trl, "alora": _trl, "prefillshare": _prefillshare}[method]
    invocation = None
    if method == "alora":
        first = workload.conversations[0]
        end = first.turns[0].prompt_length
        invocation = list(first.token_ids[end - first.turns[0].header_length : end])
    model = _model(case, invocation)
    if case.checkpointing:
        causal_lm_of(model).activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model, make(model, case, workload)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that the optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """The optimizer of every method. A rate of 0 does all the work and leaves the weights alone."""
    return torch.optim.AdamW(trainable(model), lr=0.0, weight_decay=0.0, fused=True)


def _load(case: Case) -> PreTrainedModel:
    if case.model != RANDOM_MODEL:
        return load_causal_lm(case.model, dtype=case.torch_dtype, device=DEVICE)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(case.config(), dtype=case.torch_dtype)
    model.to(DEVICE)
    return model


def _model(case: Case, invocation: list[int] | None) -> nn.Module:
    model = _load(case)
    model.set_attn_implementation("sdpa")  # the trainer under test switches to its own
    if case.adapter == "none":
        return model
    torch.manual_seed(1)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        alora_invocation_tokens=invocation,
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=False)


def _sft(model: nn.Module, case: Case, workload: Workload) -> RunMicroBatch:
    """A hand-written loop: SDPA, right padding, LM head on the positions that predict a target."""
    causal_lm = causal_lm_of(model)
    head = causal_lm.get_output_embeddings()
    batches = [_padded(rows) for rows in workload.micro_batches]
    total = workload.response_tokens

    def run(index: int) -> float:
        ids, positions, labels = batches[index]
        # Causal attention never looks right, so padding on the right needs no mask.
        hidden = causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[positions]
        loss = F.cross_entropy(head(hidden).float(), labels, reduction="sum") / total
        loss.backward()
        return loss.item()

    return run


def _padded(rows: tuple[Conversation, ...]) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Inputs (B, T) without the last token, (row, column) of each predicting position, targets."""
    inputs = [torch.tensor(c.token_ids[:-1]) for c in rows]
    ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
    places = [
        (row, column, conversation.token_ids[column + 1])
        for row, conversation in enumerate(rows)
        for column in range(conversation.turns[0].prompt_length - 1, conversation.turns[0].end - 1)
    ]
    row_index, column_index, labels = torch.tensor(places).T
    return ids.to(DEVICE), (row_index.to(DEVICE), column_index.to(DEVICE)), labels.to(DEVICE)


def _trl(model: Any, case: Case, workload: Workload) -> RunMicroBatch:
    """TRL's trainer with the loss on the completion only, and its own collator."""
    features = [_labelled(c) for c in workload.conversations]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                max_length=None,
                completion_only_loss=True,
                dataset_kwargs={"skip_prepare_dataset": True},
                gradient_checkpointing=False,  # switched on in the model itself, as for all methods
                bf16=False,  # the weights have the dtype already
                **_arguments(folder),
            ),
            train_dataset=Dataset.from_list(features),
            processing_class=_unread_tokenizer(),
        )
    batches = [
        trainer.data_collator([_labelled(c) for c in rows]) for rows in workload.micro_batches
    ]
    return _training_step(trainer, model, batches, workload)


def _labelled(conversation: Conversation) -> dict[str, list[int]]:
    turn = conversation.turns[0]
    ids = list(conversation.token_ids)
    labels = [IGNORED] * turn.prompt_length + ids[turn.prompt_length :]
    return {"input_ids": ids, "labels": labels}


@functools.cache
def _unread_tokenizer() -> PreTrainedTokenizerFast:
    """TRL asks for a tokenizer; of rows that are token ids already it reads the pad id alone."""
    vocabulary = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<pad>"
    )


def _prefillshare(model: nn.Module, case: Case, workload: Workload) -> RunMicroBatch:
    """Our trainer: LoRA prefills with its own weights, full fine-tuning with a frozen copy."""
    base = _load(case) if case.adapter == "none" else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = CacheConditionedTrainer(
            model,
            CacheConditionedConfig(**_arguments(folder)),
            base=base,
            train_dataset=workload.conversations,
        )
    batches = [collate(rows, rule=RULE, method="prefillshare") for rows in workload.micro_batches]
    return _training_step(trainer, model, batches, workload)


def _arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": DEVICE.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }


def _training_step(
    trainer: Any, model: nn.Module, batches: list[dict[str, Any]], workload: Workload
) -> RunMicroBatch:
    total = torch.tensor(workload.response_tokens)

    def run(index: int) -> float:
        loss: Tensor = trainer.training_step(model, dict(batches[index]), total)
        return loss.item()

    return run
