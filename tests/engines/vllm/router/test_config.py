"""Options of the router: what a file must say, and what it is told where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.router.__main__ import main
from prefillshare_train.engines.vllm.router.config import RouterConfig

GOOD: dict[str, Any] = {
    "handover": "nixl",
    "prefill": ["http://127.0.0.1:8100/"],
    "decoders": {"math": {"replicas": ["http://127.0.0.1:8200"]}},
    "base": "folder",
}


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFILLSHARE_API_KEY", "outer")
    monkeypatch.setenv("VLLM_API_KEY", "inner")
    path = tmp_path / f"router.{suffix}"
    # JSON is YAML too.
    path.write_text(json.dumps(GOOD | {"server": {"port": 9000}}))
    config = RouterConfig.load(path)
    assert config.prefill == ("http://127.0.0.1:8100",)
    assert (config.server.port, config.server.api_key) == (9000, "outer")
    assert config.upstream_api_key is not None
    assert config.upstream_api_key.get_secret_value() == "inner"
    assert "inner" not in repr(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"handover": "mail"}, ["handover", "'mail'"]),
        ({"prefill": []}, ["prefill"]),
        ({"prefill": ["127.0.0.1:8100"]}, ["prefill.0", "http://127.0.0.1:8100"]),
        ({"prefill": ["http://h:99999"]}, ["prefill.0"]),
        ({"prefill": ["http://h", "http://h/"]}, ["prefill", "given twice"]),
        ({"decoders": {}}, ["decoders"]),
        ({"decoders": {"math": {}}}, ["decoders.math", "handover: store"]),
        ({"decoders": {"base": {"replicas": ["http://h"]}}}, ["decoders.base"]),
        ({"decoders": {"m": {"replicas": ["http://127.0.0.1:8100"]}}}, ["is a prefill instance"]),
        ({"decoders": {"math": {"replica": []}}}, ["decoders.math.replica"]),
        ({"base": None}, ["tokenizer"]),
        ({"max_running": 0}, ["max_running", "found 0"]),
        ({"health_interval_s": 0}, ["health_interval_s"]),
        ({"server": {"ports": 1}}, ["server", "ports"]),
        ({"server": {"host": "0.0.0.0"}}, ["API key"]),
        ({"prefil": []}, ["prefil"]),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(VllmError) as caught:
        RouterConfig.parse(GOOD | change, source="router.yaml")
    assert str(caught.value).startswith("router.yaml: ")
    for word in words:
        assert word in str(caught.value)


def test_a_key_is_not_shown() -> None:
    with pytest.raises(VllmError) as caught:
        RouterConfig.parse(GOOD | {"upstream_api_key": 123456789})
    assert "123456789" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", None])
def test_a_file_that_is_none(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "router.yaml"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err
