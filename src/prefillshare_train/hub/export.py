"""A checkpoint as others load it: an ordinary model or adapter, and the contract beside it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import CHAT_TEMPLATE_DIR

from prefillshare_train.core.contract import CONTRACT_NAME, Contract
from prefillshare_train.core.loading import load_decoder
from prefillshare_train.data import saved_renderer
from prefillshare_train.hub.alora import invocation_tokens
from prefillshare_train.hub.card import CardFacts, write_card
from prefillshare_train.hub.errors import HubError
from prefillshare_train.hub.folders import new_folder
from prefillshare_train.hub.recipe import published_recipe

Format = Literal["hf", "alora"]
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
_DECODER_FOLDER = "decoder"
# Float32 sums in another order; anything larger is a part that merging left out.
_MERGE_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write.

    Attributes:
        merge: add a LoRA decoder's adapter to its base, and write a full checkpoint.
        format: `hf`, or `alora` for an adapter that stock PEFT starts at the assistant header.
        base_id, base_revision: what the base is called where the decoder will be loaded, in place
            of what it was called in training.
        base: where the base lies here, for merging, where that is another place again.
        dtype: of merged weights; the contract's K/V dtype where None.
        shard_size: weights are split into files of this size, as `save_pretrained` reads it.
        card: what the model card says beside what the checkpoint tells.
    """

    merge: bool = False
    format: Format = "hf"
    base_id: str | None = None
    base_revision: str | None = None
    base: str | None = None
    dtype: str | None = None
    shard_size: str = "5GB"
    card: CardFacts = dataclasses.field(default_factory=CardFacts)


def export_decoder(
    checkpoint: Path, out: Path, options: ExportOptions, *, name: str | None = None
) -> Path:
    """Write a decoder to `out`, whole or not at all.

    Full and merged weights are loaded back before the folder appears; their logits equal those of
    the weights that were written, bit for bit.

    Args:
        checkpoint: a decoder's folder, a `checkpoint-N` folder, or a run's folder that holds a
            finished decoder.
        out: folder to make.
        name: what its model card calls it, such as the hub id that it will have; `out` where None.

    Returns:
        `out`.

    Raises:
        HubError: options do not fit the decoder, `out` is taken, or the result does not load back.
        ContractError: no contract is there, or the base to merge into is another.
        DataError: tokenizer or template are not those of the contract.
    """
    checkpoint = checkpoint_folder(checkpoint)
    contract = Contract.load(checkpoint)
    _check_options(contract, options)
    with new_folder(out) as folder:
        _copy_tokenizer(checkpoint, folder, contract)
        exported = dataclasses.replace(
            contract,
            base_id=options.base_id or contract.base_id,
            base_revision=_revision(contract, options),
            adapter="none" if options.merge else contract.adapter,
        )
        if options.merge:
            _write_merged(checkpoint, folder, contract, options)
        elif contract.adapter == "none":
            _write_full(checkpoint, folder, contract, options)
        else:
            _write_adapter(checkpoint, folder, exported, options)
        exported.save(folder)
        recipe = published_recipe(checkpoint, folder, exported)
        write_card(folder, name or str(out), checkpoint, exported, recipe, options.card)
    return out


def checkpoint_folder(path: Path) -> Path:
    """The folder with the contract: the one given, or the finished decoder of a run's folder."""
    decoder = path / _DECODER_FOLDER
    if not (path / CONTRACT_NAME).is_file() and (decoder / CONTRACT_NAME).is_file():
        return decoder
    return path


def _check_options(contract: Contract, options: ExportOptions) -> None:
    if contract.adapter == "none" and options.merge:
        raise HubError(
            "this decoder is fully trained: there is no adapter to merge. Leave --merge out"
        )
    if contract.adapter == "none" and options.format == "alora":
        raise HubError(
            "this decoder is fully trained and has no adapter to write as an aLoRA. "
            "Export it with --format hf"
        )
    if options.merge and options.format == "alora":
        raise HubError("--merge leaves no adapter to write as an aLoRA: choose one of the two")
    if options.dtype is not None and not options.merge:
        raise HubError(
            f"--dtype {options.dtype} is of merged weights, and all others are written as they "
            "were trained. Add --merge to a LoRA decoder, or leave --dtype out"
        )
    if options.base is not None and not options.merge:
        raise HubError(
            f"--base-path {options.base} is for merging, and nothing else reads the base. Add "
            "--merge, or leave it out; --base gives the base another name"
        )


def _revision(contract: Contract, options: ExportOptions) -> str | None:
    # A revision belongs to the name that it was given with.
    if options.base_id is not None or options.base_revision is not None:
        return options.base_revision
    return contract.base_revision


def _copy_tokenizer(checkpoint: Path, folder: Path, contract: Contract) -> None:
    if contract.prompt:
        saved_renderer(checkpoint, contract.prompt)
    for name in _TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
    for template in sorted((checkpoint / CHAT_TEMPLATE_DIR).glob("*.jinja")):
        (folder / CHAT_TEMPLATE_DIR).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / CHAT_TEMPLATE_DIR / template.name)
    if contract.prompt:
        saved_renderer(folder, contract.prompt)


def _write_full(checkpoint: Path, folder: Path, contract: Contract, options: ExportOptions) -> None:
    model = _load_back(checkpoint)
    _write_model(model, folder, contract, options)


def _write_merged(
    checkpoint: Path, folder: Path, contract: Contract, options: ExportOptions
) -> None:
    """Merge in float32 and round once; a sum in bfloat16 would lose most of a small adapter."""
    try:
        loaded = load_decoder(checkpoint, base=options.base, dtype=torch.float32, device="cpu")
    except OSError as error:
        raise HubError(
            f"the base {options.base or contract.base_id} to merge into cannot be loaded: {error}. "
            "Name its folder or hub id with --base-path"
        ) from error
    assert isinstance(loaded.decoder, PeftModel)
    expected = _probe_logits(loaded.decoder)
    merged: Any = loaded.decoder.merge_and_unload()
    difference = (_probe_logits(merged) - expected).abs().max().item()
    if not difference <= _MERGE_TOLERANCE * expected.abs().max().item():
        raise HubError(
            f"merging changes the logits by up to {difference:.3g}: this kind of adapter cannot be "
            "merged. Export it without --merge"
        )
    dtype = getattr(torch, options.dtype or contract.kv_dtype)
    # Parameters only: `model.to` would round the RoPE frequencies too.
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)
    _write_model(merged, folder, contract, options)


def _write_model(
    model: PreTrainedModel, folder: Path, contract: Contract, options: ExportOptions
) -> None:
    # Training switches it off; whoever loads the checkpoint wants to generate.
    model.config.use_cache = True
    ends = contract.prompt.get("end_token_ids")
    if ends:
        settings: Any = model.generation_config or GenerationConfig()
        settings.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
        model.generation_config = settings
    expected = _probe_logits(model)
    model.save_pretrained(folder, max_shard_size=options.shard_size)
    found = _probe_logits(_load_back(folder, model.config._attn_implementation))
    if not torch.equal(found, expected):
        difference = (found.float() - expected.float()).abs().max().item()
        raise HubError(
            f"the written checkpoint's logits differ from the decoder's by up to {difference:.3g}; "
            "nothing was exported. Please report the architecture and the adapter's settings"
        )


def _load_back(folder: Path, attention: str | None = None) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        use_safetensors=True,
        attn_implementation=attention,
        output_loading_info=True,
    )
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise HubError(f"{folder}: {kind.replace('_', ' ')}: {sorted(map(str, report[kind]))}")
    made: PreTrainedModel = model.eval()
    return made


@torch.no_grad()
def _probe_logits(model: Any) -> Tensor:
    ids = torch.randint(
        model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0)
    )
    logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return logits


def _write_adapter(
    checkpoint: Path, folder: Path, contract: Contract, options: ExportOptions
) -> None:
    """The adapter's own file, byte for byte; its configuration names the base as others do."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (checkpoint / name).is_file():
            raise HubError(f"{checkpoint} has no {name}: it is not a complete LoRA decoder")
    settings = json.loads((checkpoint / ADAPTER_CONFIG).read_text())
    settings |= {
        "base_model_name_or_path": contract.base_id,
        "revision": contract.base_revision,
        "inference_mode": True,
        "alora_invocation_tokens": None,
    }
    if options.format == "alora":
        renderer = saved_renderer(folder, contract.prompt)
        settings["alora_invocation_tokens"] = invocation_tokens(
            contract, settings, checkpoint / ADAPTER_WEIGHTS, renderer
        )
    shutil.copyfile(checkpoint / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
