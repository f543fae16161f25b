"""Evaluation over several ranks: each row once, weighted by tokens, sharded or whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from prefillshare_train.core.modules import evaluating
from prefillshare_train.training.evaluation_batches import COUNTED, EvaluationBatches
from prefillshare_train.training.launch import LaunchError, shards_parameters


class TokenWeightedEvaluation(Trainer):
    """A trainer's evaluation, in terms of `loss_sums` and `_collator`, which it must have."""

    _base_placed = False
    _collator: Callable[[], Callable[..., dict[str, Any]]]
    loss_sums: Callable[..., dict[str, Tensor]]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This rank's share of the evaluation rows; see `EvaluationBatches`."""
        rows: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, str):
            named: Any = self.eval_dataset
            rows = named[rows]
        if rows is None:
            raise ValueError("evaluation needs an eval_dataset")
        batches = EvaluationBatches(
            rows,
            self.args.eval_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self._collator(),
        )
        return DataLoader(batches, batch_size=None)

    def _evaluated_model(self) -> nn.Module:
        if self.is_in_train or (self._base_placed and shards_parameters(self.accelerator)):
            return self.model_wrapped
        if shards_parameters(self.accelerator):
            raise LaunchError("sharded weights can be evaluated once training has placed them")
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss, token accuracy and perplexity over target tokens, whatever the batch split."""
        model = self._evaluated_model()
        totals = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        with evaluating(model), torch.no_grad():
            for inputs in dataloader:
                inputs = self._prepare_inputs(inputs)
                with self.compute_loss_context_manager():
                    sums = self.loss_sums(model, inputs, count_correct=True)
                if inputs.get(COUNTED, True):
                    totals[0] += sums["nll"]
                    totals[1] += sums["correct"]
                    totals[2] += inputs["labels"].numel()
                    layout: Any = inputs["layout"]
                    totals[3] += layout.conversations
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        nll, correct, tokens, examples = self.accelerator.reduce(totals, "sum").tolist()
        loss = nll / tokens
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": float(torch.tensor(loss).exp()),
            f"{metric_key_prefix}_token_accuracy": correct / tokens,
        }
        return EvalLoopOutput(np.empty(0), None, metrics, int(examples))
