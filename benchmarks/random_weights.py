"""A model of a published shape with random weights, for machines that reach no hub.

    python benchmarks/random_weights.py qwen3-1.7b FOLDER

Speed and memory do not depend on what the weights are. (Accuracy does: nothing is evaluated on
these.) Shapes are those of the published config.json files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3Config

from prefillshare_train.core.devices import default_device

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(shape: str) -> PreTrainedConfig:
    """The configuration of a published model."""
    sizes: dict[str, Any]
    if shape == "qwen3-1.7b":
        sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
        sizes |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        return Qwen3Config(
            vocab_size=151936,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
            **sizes,
        )
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    return LlamaConfig(
        vocab_size=128256, max_position_embeddings=131072, rope_parameters=LLAMA3_ROPE, **sizes
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=("qwen3-1.7b", "llama3.1-8b"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    with default_device():
        model = AutoModelForCausalLM.from_config(config_of(options.shape), dtype=torch.bfloat16)
    model.save_pretrained(options.folder)
    print(f"{model.num_parameters() / 1e9:.2f}e9 random weights in {options.folder}")


if __name__ == "__main__":
    main()
