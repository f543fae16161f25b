"""Recipes: YAML files and `key=value` overrides onto typed dataclasses.

OmegaConf reads, merges and interpolates; pydantic checks and converts. Unknown keys are errors that
suggest the nearest name, and every error is raised before any data or model is touched.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.devices import default_dtype_name
from prefillshare_train.data import DataConfig, SourceConfig, unlike_hub_id
from prefillshare_train.training.config import CacheConditionedConfig

Dtype = Literal["float32", "bfloat16", "float16"]


class RecipeError(ValueError):
    """A recipe is wrong; the message names the file or key, what was found and what to do."""


@dataclass(kw_only=True)
class BaseConfig:
    """The frozen base that prefills."""

    model: str
    """Hub id or local path."""
    revision: str | None = None
    """Commit, tag or branch of a hub model."""
    dtype: Dtype | Literal["auto"] = "auto"
    """dtype of the base's weights, and so of the prompt cache. `auto` is bfloat16 where this
    machine multiplies in it, float32 elsewhere (most laptops); `training.use_cpu: true` asks its
    CPU, whatever GPUs there are."""

    def __post_init__(self) -> None:
        # No field, which a recipe could set.
        self.dtype_is_auto = self.dtype == "auto"
        if self.dtype_is_auto:
            self.resolve_dtype()

    def resolve_dtype(self, device: str | None = None) -> None:
        """Set what `auto` comes out as on a device; the default one where None."""
        found: Any = default_dtype_name(device)
        self.dtype = found


@dataclass(kw_only=True)
class DecoderConfig:
    """The decoder that is trained."""

    adapter: Literal["none", "lora"] = "lora"
    """`lora` shares one copy of the weights with the base; `none` trains a full second copy."""
    lora: dict[str, Any] = field(
        default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    )
    """Any field of `peft.LoraConfig`."""
    dtype: Dtype = "float32"
    """dtype of a fully trained decoder's weights. Adapters are float32 whatever the base's."""


@dataclass(kw_only=True)
class Recipe:
    """One training run."""

    base: BaseConfig
    """The frozen base."""
    data: DataConfig
    """Rows and how they become tokens."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """What is trained."""
    method: Literal["prefillshare", "full_prompt"] = "prefillshare"
    """`prefillshare`, or `full_prompt` for the ordinary fine-tuning baseline on the same rows."""
    boundary: str = "last_token"
    """Boundary rule: `last_token`, `generation_prompt`, `block_aligned:B` or `ratio:r`."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any field of `CacheConditionedConfig`, that is of `transformers.TrainingArguments` too.
    `bf16: auto` is true where `base.dtype` is, or comes out as, bfloat16."""
    decoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Several decoders trained at once over one prefill, by name. Each lists what it has of its own
    among `decoder`, `data`, `training` and `boundary`; the rest is the recipe's. Checkpoints go to
    `<output_dir>/<name>` unless it names a folder."""
    local_copies: dict[str, str] = field(default_factory=dict)
    """Folders that stand in for hub models and data sets, by hub id: what the recipe names stays as
    it is, in the decoder's contract too, and is read from the folder. For machines without a hub;
    keep it in a file of its own and compose it after any recipe."""

    def __post_init__(self) -> None:
        BoundaryRule.parse(self.boundary)
        if self.base.dtype_is_auto and self.training.get("use_cpu"):
            self.base.resolve_dtype("cpu")
        if "output_dir" not in self.training:
            raise ValueError("training.output_dir is missing: name the folder for checkpoints")
        for name, folder in self.local_copies.items():
            if not Path(folder).expanduser().exists():
                raise ValueError(f"local_copies: {folder}, given for {name}, does not exist")

    @property
    def bf16(self) -> bool:
        """What `training.bf16: auto` stands for."""
        return self.base.dtype == "bfloat16"

    @property
    def base_location(self) -> str:
        """Where the base is read from: its local copy, or what `base.model` names."""
        return self.local_copies.get(self.base.model, self.base.model)

    @property
    def base_name(self) -> str:
        """What a contract calls the base: a folder's name never reads like a hub id."""
        name = self.base.model
        return name if name in self.local_copies else unlike_hub_id(name, Path())

    @property
    def local_data(self) -> DataConfig:
        """`data`, with the local copies of its sources in their place."""

        def local(source: SourceConfig | None) -> SourceConfig | None:
            if source is None or source.source not in self.local_copies:
                return source
            return dataclasses.replace(source, source=self.local_copies[source.source])

        train = local(self.data.train)
        assert train is not None
        return dataclasses.replace(self.data, train=train, eval=local(self.data.eval))

    def training_arguments(self) -> CacheConditionedConfig:
        """The trainer's arguments, checked by binding them to the dataclass.

        Raises:
            RecipeError: a value is not one that the trainer takes, or `accelerate launch` was given
                another mixed precision.
        """
        # YAML reads a bare `no` as false; every *_strategy takes the word.
        values: dict[str, Any] = {
            key: "no" if value is False and key.endswith("_strategy") else value
            for key, value in self.training.items()
        }
        if values.get("bf16") == "auto":
            values["bf16"] = self.bf16
        try:
            arguments = CacheConditionedConfig(**values, method=self.method, boundary=self.boundary)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"training: {error}") from error
        if {"bf16", "fp16"} & set(self.training):
            _check_precision(arguments)
        return arguments


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where it lies, since relative paths in it are looked up from there."""

    recipe: Recipe
    base_dir: Path
    values: dict[str, Any]

    def to_yaml(self) -> str:
        """The composed recipe, for the run's folder.

        With what `auto` came out as, and with sources that lie here told from those of the hub.
        """
        dtype = self.recipe.base.dtype
        values = self.values | {"base": {**self.values["base"], "dtype": dtype}}
        values["data"] = {
            key: self._told_apart(value) if key in ("train", "eval") and value else value
            for key, value in values["data"].items()
        }
        if self.recipe.training.get("bf16") == "auto":
            training = {**self.recipe.training, "bf16": self.recipe.bf16}
            values |= {"training": training}
        return yaml.safe_dump(values, sort_keys=False)

    def _told_apart(self, source: dict[str, Any]) -> dict[str, Any]:
        name = source["source"]
        if name in self.recipe.local_copies:
            return source
        return {**source, "source": unlike_hub_id(name, self.base_dir)}


def load_recipe(paths: Sequence[Path | str], overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Compose recipe files from left to right, then `key=value` overrides.

    A file's `include:` lists files, relative to it, that are composed before it.

    Raises:
        RecipeError: a file is missing or not YAML, a key is unknown or a value is of a wrong type.
    """
    if not paths:
        raise RecipeError("no recipe file was given")
    merged: Any = OmegaConf.create({})
    try:
        for path in paths:
            merged = OmegaConf.merge(merged, *_with_includes(Path(path), ()))
        for text in overrides:
            if "=" not in text:
                raise RecipeError(f"override {text!r} is not key=value")
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{paths[-1]}: {error}") from error
    assert isinstance(values, dict)
    plain: dict[str, Any] = {str(key): value for key, value in values.items()}
    loaded = LoadedRecipe(parse_recipe(plain), Path(paths[-1]).resolve().parent, plain)
    decoder_recipes(loaded)  # so that their mistakes are told now
    return loaded


def decoder_recipes(loaded: LoadedRecipe) -> dict[str, LoadedRecipe]:
    """A recipe of its own for each of `decoders`, by name, in order.

    Raises:
        RecipeError: a name or key is wrong, or two decoders would write to one folder.
    """
    common = {key: value for key, value in loaded.values.items() if key != "decoders"}
    found: dict[str, LoadedRecipe] = {}
    folders: dict[Path, str] = {}
    for name, own in loaded.recipe.decoders.items():
        unknown = sorted(set(own) - {"decoder", "data", "training", "boundary"})
        if unknown or not re.fullmatch(r"\w[\w.-]*", name):
            raise RecipeError(
                f"decoders.{name}: "
                + (f"{unknown[0]} is common to all decoders" if unknown else "not a folder's name")
                + ". A decoder has a name of letters, digits, '.', '_' and '-', and of its own "
                "decoder, data, training and boundary"
            )
        folder = f"{loaded.recipe.training['output_dir']}/{name}"
        merged = OmegaConf.merge(common, {"training": {"output_dir": folder}}, own)
        values: Any = OmegaConf.to_container(merged, resolve=True)
        try:
            found[name] = LoadedRecipe(parse_recipe(values), loaded.base_dir, values)
        except RecipeError as error:
            raise RecipeError(f"decoders.{name}: {error}") from error
        place = Path(found[name].recipe.training["output_dir"]).resolve()
        if place in folders:
            raise RecipeError(f"decoders {folders[place]} and {name} would both write to {place}")
        folders[place] = name
    return found


def parse_recipe(values: dict[str, Any]) -> Recipe:
    """Check a composed recipe.

    Raises:
        RecipeError: see `load_recipe`.
    """
    _check_keys(values, Recipe, "")
    _check_names(values.get("training") or {}, CacheConditionedConfig, "training.")
    taken = {"method", "boundary"} & set(values.get("training") or {})
    if taken:
        raise RecipeError(f"training.{min(taken)}: set {min(taken)} at the top of the recipe")
    try:
        recipe: Recipe = TypeAdapter(Recipe).validate_python(values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, item['loc'])) or 'recipe'}: {item['msg']}"
            + (f" (found {item['input']!r})" if item["type"] != "missing" else "")
            for item in error.errors()
        ]
        raise RecipeError("the recipe is not valid:\n" + "\n".join(lines)) from error
    return recipe


def _check_precision(arguments: CacheConditionedConfig) -> None:
    # transformers takes the launcher's where neither `bf16` nor `fp16` is true.
    found: Any = arguments.mixed_precision
    if found != ("fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"):
        raise RecipeError(
            f"accelerate was launched with mixed_precision {found}, and training.bf16 is false, or "
            "auto and false on this machine: the run would train in another precision than its "
            "recipe says. Pass --mixed_precision no to accelerate launch, or set "
            "training.bf16=true, and base.dtype=bfloat16 for a base in it too"
        )


def _with_includes(path: Path, parents: tuple[Path, ...]) -> list[Any]:
    path = path.resolve()
    if path in parents:
        raise RecipeError(f"{path}: recipes include each other in a circle")
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such recipe file")
    try:
        config: Any = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not OmegaConf.is_dict(config):
        raise RecipeError(f"{path} is not a mapping of keys to values")
    includes = config.pop("include", None) or []
    layers = [
        layer
        for name in ([includes] if isinstance(includes, str) else includes)
        for layer in _with_includes(path.parent / name, (*parents, path))
    ]
    return [*layers, config]


def _check_keys(values: Any, kind: Any, where: str) -> None:
    """Refuse unknown keys of a dataclass, and of the dataclasses inside it."""
    if not isinstance(values, dict):
        return
    _check_names(values, kind, where)
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        for inner in _dataclasses_in(hints[name]):
            _check_keys(value, inner, f"{where}{name}.")


def _check_names(values: dict[str, Any], kind: Any, where: str) -> None:
    names = [f.name for f in dataclasses.fields(kind) if f.init]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"Did you mean {where}{near[0]}?" if near else f"Known: {', '.join(names[:20])}"
            raise RecipeError(f"unknown key {where}{name}. {hint}")


def _dataclasses_in(hint: Any) -> list[Any]:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return [option for option in options if dataclasses.is_dataclass(option)]
