"""How prompts are made: once, by the contract of the decoders, for base and decoder alike."""

from __future__ import annotations

from dataclasses import dataclass

from prefillshare_train.core.boundary import BoundaryRule
from prefillshare_train.core.contract import Contract, ContractError
from prefillshare_train.data import DataError, Renderer, base_renderer, saved_renderer
from prefillshare_train.engines.vllm.errors import VllmError
from prefillshare_train.engines.vllm.prefill_id import NIXL_RULES, STORE_RULES
from prefillshare_train.engines.vllm.router.config import RouterConfig

_LAST_TOKEN = BoundaryRule("last_token")


@dataclass(frozen=True)
class Prompting:
    """The renderer, and who runs which prompt token.

    Attributes:
        renderer: of all decoders.
        rules: boundary rules by decoder.
    """

    renderer: Renderer
    rules: dict[str, BoundaryRule]

    @classmethod
    def load(cls, config: RouterConfig) -> Prompting:
        """Read the contracts and the tokenizer; no weights.

        Raises:
            VllmError: a folder cannot be read, decoders were trained over different bases or on
                different prompts, or a boundary rule is none that vLLM can keep to.
        """
        try:
            return cls._load(config)
        except (ContractError, DataError, OSError, ValueError) as error:
            if isinstance(error, VllmError):
                raise
            raise VllmError(f"router: {error}") from error

    @classmethod
    def _load(cls, config: RouterConfig) -> Prompting:
        renderer: Renderer | None = None
        first: tuple[str, str] | None = None
        rules = dict.fromkeys(config.decoders, _LAST_TOKEN)
        for name, pool in config.decoders.items():
            if pool.folder is None:
                continue
            contract = Contract.load(pool.folder)
            first = first or (name, contract.base_fingerprint)
            if contract.base_fingerprint != first[1]:
                raise VllmError(
                    f"decoder {name} was trained over the base {contract.base_fingerprint}, and "
                    f"decoder {first[0]} over {first[1]}: they cannot share a prefill"
                )
            renderer = renderer or saved_renderer(pool.folder, contract.prompt)
            try:
                contract.verify(prompt=renderer.prompt_contract())
            except ContractError as error:
                raise VllmError(f"decoder {name} ({pool.folder}): {error}") from error
            rules[name] = _servable(name, contract.rule, config)
        if renderer is None:
            assert config.base is not None
            try:
                renderer = base_renderer(config.base, None, config.chat_template)
            except (OSError, ValueError) as error:
                raise VllmError(f"the base {config.base}: {error}") from error
        return cls(renderer, rules)


def _servable(name: str, rule: BoundaryRule, config: RouterConfig) -> BoundaryRule:
    served = NIXL_RULES if config.handover == "nixl" else STORE_RULES
    if rule.kind not in served:
        raise VllmError(
            f"decoder {name} was trained with the boundary rule {rule}; with handover "
            f"{config.handover} vLLM serves {', '.join(served)}"
        )
    return rule
