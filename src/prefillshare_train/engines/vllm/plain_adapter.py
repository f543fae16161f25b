"""A copy of an aLoRA-format adapter that stock vLLM loads.

vLLM refuses an adapter with invocation tokens, and without a network that refusal ends the whole
process. On the store route the connector draws the boundary, so that the adapter is a plain LoRA to
vLLM. The decoder's own folder is left as it is: PEFT still reads it as the aLoRA that it is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.topology import Decoder, host_label

_CONFIG = "adapter_config.json"
_KEY = "alora_invocation_tokens"


def loadable_folder(decoder: Decoder, copies: Path) -> Path:
    """The folder that vLLM may load a decoder from.

    Args:
        copies: folder under which a copy is made, where one is needed; one of an earlier start is
            replaced.

    Returns:
        The decoder's own folder, or that of its copy.

    Raises:
        VllmError: the copy cannot be written.
    """
    if not decoder.invocation_tokens:
        return decoder.folder
    place = copies / host_label(decoder.name)
    beside = copies / f".unfinished-{place.name}-{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        copies.mkdir(parents=True, exist_ok=True)
        shutil.copytree(decoder.folder, beside)
        config = beside / _CONFIG
        settings = json.loads(config.read_text())
        del settings[_KEY]
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise VllmError(
            f"decoder {decoder.name}: the copy of {decoder.folder} that vLLM loads cannot be "
            f"written to {place}: {error}"
        ) from None
    return place
