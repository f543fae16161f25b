"""Cache-conditioned fine-tuning: decoders that read a frozen base model's prompt KV cache.

The public API. Names are imported when first used, so that `import prefillshare_train` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "BoundaryRule": "core.boundary",
    "CacheConditionedConfig": "training.config",
    "CacheConditionedTrainer": "training.trainer",
    "Contract": "core.contract",
    "ContractError": "core.contract",
    "Conversation": "core.spans",
    "DataConfig": "data",
    "PrefillModule": "core.modules",
    "PrefillShareModel": "hub.model",
    "PromptCache": "core.prompt_cache",
    "SourceConfig": "data",
    "Turn": "core.spans",
    "UnsupportedModelError": "core.families",
    "add_adapter": "core.loading",
    "build_dataset": "data",
    "generate": "core.generate",
    "load_causal_lm": "core.modules",
    "load_decoder": "core.loading",
    "load_recipe": "training.recipe",
    "run_training": "training.run",
    "saved_renderer": "data",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
