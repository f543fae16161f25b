"""The aLoRA format: a LoRA decoder that stock PEFT runs over a base's cache.

An aLoRA acts from the last occurrence of its invocation tokens on, and leaves the K/V of everything
before to the base. That is our boundary rule `generation_prompt`, with the assistant header as
invocation tokens. No other rule says the same, so no other is exported as such.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from prefillshare_train.core.contract import Contract
from prefillshare_train.data import Renderer
from prefillshare_train.data.generation_header import generation_header
from prefillshare_train.hub.errors import HubError

# Each changes what the base computes before the invocation, or is not masked by PEFT's aLoRA.
_REFUSED = {
    "modules_to_save": "retrained modules act on the whole prompt",
    "trainable_token_indices": "retrained embeddings act on the whole prompt",
    "target_parameters": "PEFT does not mask adapters of single parameters",
    "layer_replication": "replicated layers change the cache's shape",
    "use_dora": "DoRA has no aLoRA form",
    "use_qalora": "QALoRA has no aLoRA form",
}


def invocation_tokens(
    contract: Contract, settings: dict[str, Any], weights: Path, renderer: Renderer
) -> list[int]:
    """The invocation tokens with which PEFT's aLoRA computes what the decoder was trained to.

    Args:
        settings: the adapter's `adapter_config.json`.
        weights: its safetensors file.

    Raises:
        HubError: there are none; the message names what stands in the way.
    """
    for key, reason in _REFUSED.items():
        if settings.get(key):
            raise _refusal(f"its {key} is {settings[key]!r}, and {reason}")
    if settings.get("bias", "none") != "none":
        raise _refusal(f"its bias is {settings['bias']!r}: trained biases act on the whole prompt")
    with safe_open(str(weights), "pt") as file:
        embedded = [key for key in file.keys() if "lora_embedding" in key]  # noqa: SIM118
    if embedded:
        raise _refusal(f"it adapts an embedding ({embedded[0]}), which PEFT does not mask")
    if contract.method != "prefillshare":
        raise _refusal(f"its method is {contract.method!r}: it reads its own prompts")
    header = generation_header(renderer)
    rule = contract.rule
    if rule.kind != "generation_prompt" and not (rule.kind == "last_token" and len(header) == 1):
        raise _refusal(
            f"its boundary rule is {rule}; only generation_prompt lets the adapter act from the "
            f"assistant header on (here {renderer.decode(header)!r}, {len(header)} tokens)"
        )
    return list(header)


def _refusal(reason: str) -> HubError:
    return HubError(
        f"this decoder is no aLoRA: {reason}. Export it with --format hf, for loaders that check "
        "its contract"
    )
