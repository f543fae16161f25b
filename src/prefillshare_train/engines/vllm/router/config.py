"""Options of the router, and the YAML or JSON file that holds them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.serving.server.config import ServerConfig

API_KEY_VARIABLE = "PREFILLSHARE_API_KEY"
UPSTREAM_KEY_VARIABLE = "VLLM_API_KEY"
Handover = Literal["nixl", "store"]


def _address(text: str) -> str:
    parts = urlsplit(text)
    plain = not (parts.username or parts.query or parts.fragment)
    if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ValueError(f"{text!r} is not an address such as http://127.0.0.1:8100")
    _ = parts.port  # raises ValueError where it is no port
    return text.rstrip("/")


Address = Annotated[str, AfterValidator(_address)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DecoderPool(_Strict):
    """The instances of one decoder.

    Attributes:
        replicas: their addresses. None at all: the prefill instances serve the decoder themselves,
            as a LoRA adapter beside the base (one process, store route).
        model: the name that they serve it by; the decoder's own where None.
        folder: checkpoint of the decoder. Its contract gives the chat template, the tokens that
            end a response and the boundary rule.
    """

    replicas: tuple[Address, ...] = ()
    model: str | None = None
    folder: Path | None = None


class RouterConfig(_Strict):
    """Options of the router.

    Attributes:
        handover: how K/V go from the base to the decoders: `nixl` (the prefill answers with
            `kv_transfer_params`, good for one decode) or `store` (the prefill fills the store).
        prefill: addresses of the instances that run the base.
        base_model: the name that they serve the base by.
        decoders: pools by the names that clients use.
        base: hub id or folder of the base, for tokenizer and template where no decoder has a
            `folder`.
        chat_template: without decoder folders: a `.jinja` file or a packaged name.
        upstream_api_key: the instances' own `--api-key`.
        max_model_len: longest prompt and response together; the least that the instances report
            where None.
        block_tokens: tokens of a block in the router's notion of what a prefill replica keeps;
            best the instances' own `--block-size`.
        index_blocks: blocks that a prefill replica is thought to keep until it has told how many
            it has.
        max_running: responses that may be under way; one more is answered 429.
        max_attempts: how often a request is tried, each time with a prefill of its own.
        connect_timeout_s: for a connection to an instance.
        prefill_timeout_s: for a whole prefill call, queueing at the instance included.
        token_timeout_s: for the first token of a decode, and between tokens.
        health_interval_s: between two health checks of an instance.
        health_timeout_s: an instance that has not answered by then fails the check.
        server: what clients meet: address, API key, limits.
    """

    handover: Handover
    prefill: tuple[Address, ...] = Field(min_length=1)
    base_model: str = Field("base", min_length=1)
    decoders: dict[str, DecoderPool] = Field(min_length=1)
    base: str | None = None
    chat_template: str | None = None
    upstream_api_key: SecretStr | None = None
    max_model_len: int | None = Field(None, ge=2)
    block_tokens: int = Field(128, ge=1)
    index_blocks: int = Field(4096, ge=1)
    max_running: int = Field(256, ge=1)
    max_attempts: int = Field(3, ge=1)
    connect_timeout_s: Seconds = 5.0
    prefill_timeout_s: Seconds = 300.0
    token_timeout_s: Seconds = 300.0
    health_interval_s: Seconds = 2.0
    health_timeout_s: Seconds = 5.0
    server: ServerConfig = Field(default_factory=ServerConfig)

    @field_validator("server", mode="before")
    @classmethod
    def _server(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.name for field in dataclasses.fields(ServerConfig)}
        if unknown := sorted(value.keys() - known):
            raise ValueError(f"{unknown[0]} is not an option; there are {', '.join(sorted(known))}")
        return ServerConfig(**value)

    @model_validator(mode="after")
    def _fits_together(self) -> RouterConfig:
        _refuse_twice("prefill", self.prefill)
        for name, pool in self.decoders.items():
            _refuse_twice(f"decoders.{name}.replicas", pool.replicas)
            if not name or (pool.model or name) == self.base_model:
                raise ValueError(f"decoders.{name}: the name is empty, or is that of the base")
            if not pool.replicas and self.handover != "store":
                raise ValueError(
                    f"decoders.{name}: it has no replicas, so that the prefill instances serve it; "
                    "this needs handover: store"
                )
            if shared := set(pool.replicas) & set(self.prefill):
                raise ValueError(
                    f"decoders.{name}: {shared.pop()} is a prefill instance. Leave replicas out "
                    "where the prefill instances serve the decoder"
                )
        if self.base is None and not any(pool.folder for pool in self.decoders.values()):
            raise ValueError("give base, or the folder of a decoder: prompts need a tokenizer")
        return self

    @classmethod
    def load(cls, path: Path) -> RouterConfig:
        """Read a YAML or JSON file.

        API keys that it leaves out come from the variables `PREFILLSHARE_API_KEY` (what clients
        must send) and `VLLM_API_KEY` (what the instances ask for).

        Raises:
            VllmError: the file cannot be read, or a value is wrong; the message names file and
                key.
        """
        try:
            values = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise VllmError(f"{path}: {error}") from error
        if not isinstance(values, dict):
            raise VllmError(f"{path}: should hold the router's options by name")
        return cls.parse(_with_keys(values), source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], *, source: str = "router") -> RouterConfig:
        """Check plain values.

        Raises:
            VllmError: a value is wrong; the message names `source` and key.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise VllmError("\n".join(_problems(source, error))) from error


def _with_keys(values: dict[str, Any]) -> dict[str, Any]:
    upstream = values.get("upstream_api_key") or os.environ.get(UPSTREAM_KEY_VARIABLE) or None
    server = values.get("server", {})
    if isinstance(server, dict) and server.get("api_key") is None:
        server = server | {"api_key": os.environ.get(API_KEY_VARIABLE) or None}
    return values | {"upstream_api_key": upstream, "server": server}


def _refuse_twice(name: str, addresses: tuple[str, ...]) -> None:
    for address in addresses:
        if addresses.count(address) > 1:
            raise ValueError(f"{name}: {address} is given twice")


def _problems(source: str, error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"])
        found = problem["input"]
        plain = isinstance(found, (str, int, float, bool)) and "key" not in place
        shown = f", found {found!r}" if plain else ""
        yield f"{source}: {f'{place}: ' if place else ''}{problem['msg']}{shown}"
