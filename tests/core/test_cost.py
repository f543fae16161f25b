"""FLOP counts against what PyTorch's own counter sees a step do."""

from __future__ import annotations

import copy

import pytest
from tests.core.families import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from prefillshare_train.core.attention import ATTENTION_NAME, JOB_KEYWORD, AttentionJob
from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.cost import matmul_parameters, step_flops
from prefillshare_train.core.modules import PrefillModule, attach_loss_head
from prefillshare_train.core.packing import Method, pack
from prefillshare_train.core.spans import Conversation, Turn

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 32, 48, 4, 4, 2, 8, 101
STACK = LAYERS * (HIDDEN * DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER)
HEAD = HIDDEN * VOCAB


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)


def measured_and_counted(
    prompt: int, response: int, method: Method, *, full: bool = True, checkpointing: bool = False
) -> tuple[int, int]:
    """FLOPs of a step of two conversations: PyTorch's count, and ours."""
    base = llama()
    decoder = copy.deepcopy(base)
    attach_loss_head(decoder)
    decoder.train()
    if not full:  # what adapters leave: gradients of every input, of no weight
        decoder.requires_grad_(False)
        decoder.get_input_embeddings().requires_grad_(True)
    if checkpointing:
        decoder.activation_checkpointing_enable({"use_reentrant": False})
    row = Conversation(tuple(range(prompt + response)), (Turn(prompt, prompt + response, 1),))
    batch = pack([row, row], BoundaryRule.parse("last_token"), method)
    layout = batch["layout"]
    with FlopCounterMode(display=False) as counter:
        cache = PrefillModule(base).prefill_packed(batch)
        keys = ("input_ids", "position_ids", "labels", "target_index")
        job = AttentionJob(layout.decode_groups, past=cache)
        decoder(**{key: batch[key] for key in keys}, **{JOB_KEYWORD: job})["nll"].backward()
    stack, head = matmul_parameters(base)
    counted = step_flops(
        layout,
        stack=stack,
        head=head,
        config=base.config,
        trains_base_weights=full,
        checkpointing=checkpointing,
    )
    return counter.get_total_flops(), counted


def hidden_pairs(tokens: int) -> int:
    """Pairs above the diagonal, which the CPU kernel multiplies too within a block of 64."""
    return tokens * (tokens - 1) // 2


def test_weights_of_a_llama_are_those_of_its_shapes() -> None:
    assert matmul_parameters(llama()) == (STACK, HEAD)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("prompt", "response"), [(12, 1), (41, 5), (41, 30)])
def test_a_conditioned_step_is_what_pytorch_counts(prompt: int, response: int, full: bool) -> None:
    measured, counted = measured_and_counted(prompt, response, "prefillshare", full=full)
    prefill = (LAYERS - 1) * hidden_pairs(prompt - 1)
    decode = 3 * LAYERS * hidden_pairs(response)
    assert measured == counted + 2 * 4 * HEADS * DIM * (prefill + decode)


@pytest.mark.parametrize("full", [True, False])
def test_a_full_prompt_step_is_what_pytorch_counts(full: bool) -> None:
    measured, counted = measured_and_counted(20, 9, "full_prompt", full=full)
    assert measured == counted + 2 * 4 * HEADS * DIM * 3 * LAYERS * hidden_pairs(28)


def test_checkpointing_counts_the_stack_forward_twice() -> None:
    _, once = measured_and_counted(20, 9, "full_prompt")
    measured, counted = measured_and_counted(20, 9, "full_prompt", checkpointing=True)
    tokens = 2 * 28
    pairs = 2 * 28 * 29 // 2
    assert counted - once == 2 * STACK * tokens + 4 * HEADS * DIM * LAYERS * pairs
    # PyTorch stops a replay at the last tensor it saved: each layer's last product is not repeated.
    not_repeated = 2 * tokens * LAYERS * HIDDEN * INNER
    assert measured == counted - not_repeated + 2 * 4 * HEADS * DIM * 4 * LAYERS * hidden_pairs(28)


def test_of_a_mixture_only_the_routed_experts_count() -> None:
    config = CONFIGS["qwen3_moe"]()
    stack, head = matmul_parameters(AutoModelForCausalLM.from_config(config))
    attention = (
        config.hidden_size
        * config.head_dim
        * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    )
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    router = config.hidden_size * config.num_experts
    layer = attention + router + config.num_experts_per_tok * expert
    assert (stack, head) == (
        config.num_hidden_layers * layer,
        config.vocab_size * config.hidden_size,
    )
    assert config.num_experts_per_tok < config.num_experts


def test_biases_of_experts_are_no_products() -> None:
    config = CONFIGS["gpt_oss"]()
    stack, _ = matmul_parameters(AutoModelForCausalLM.from_config(config))
    attention = (
        config.hidden_size
        * config.head_dim
        * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    )
    expert = 3 * config.hidden_size * config.intermediate_size
    router = config.hidden_size * config.num_local_experts
    layer = attention + router + config.num_experts_per_tok * expert
    assert stack == config.num_hidden_layers * layer


def test_adapters_and_tied_embeddings_do_not_change_the_count() -> None:
    from peft import LoraConfig, get_peft_model

    config = CONFIGS["llama_tied"]()
    plain = AutoModelForCausalLM.from_config(config)
    expected = matmul_parameters(plain)
    assert expected[1] == config.vocab_size * config.hidden_size
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    assert matmul_parameters(wrapped.get_base_model()) == expected
