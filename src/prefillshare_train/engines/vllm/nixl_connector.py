"""K/V through NIXL: decoders pull from the base's instance, once a prefill.

    --kv-transfer-config '{"kv_connector": "PrefillShareNixlConnector", "kv_role": "kv_producer"}'
    --kv-transfer-config '{"kv_connector": "PrefillShareNixlConnector", "kv_role": "kv_consumer",
      "kv_connector_extra_config": {"base": "/models/base"}}' --no-enable-prefix-caching

Stock vLLM compares model paths in NIXL's handshake, so that a decoder could never read a base's
K/V; here both sides put what shapes the K/V there, the base's fingerprint among it, and every
other check stays on. A decoder receives a whole prompt and runs its last token again: the boundary
rule `last_token`, and no other.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
    NixlPullConnector,
)
from vllm.logger import init_logger

from prefillshare_train.engines.vllm import base_rows
from prefillshare_train.engines.vllm.nixl_options import NixlOptions, check_role
from prefillshare_train.engines.vllm.nixl_scheduler import TicketScheduler
from prefillshare_train.engines.vllm.nixl_worker import ClaimingWorker
from prefillshare_train.engines.vllm.prefill_id import NIXL_RULES
from prefillshare_train.engines.vllm.store_options import check_supported
from prefillshare_train.engines.vllm.store_roles import Roles

logger = init_logger("vllm." + __name__)


class _NixlRoles(Roles):
    _rules = NIXL_RULES


class PrefillShareNixlConnector(NixlPullConnector):
    """Stock NIXL pulls between a base and its decoders.

    Raises:
        ContractError: a decoder does not fit the base.
        VllmError: an option is wrong, or the instance is one that cannot share K/V exactly.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        # The parents' own halves are not made: ours take their place.
        transfer = vllm_config.kv_transfer_config
        options = NixlOptions.read(transfer.kv_connector_extra_config)
        check_role(vllm_config)
        check_supported(vllm_config, kv_cache_config)
        base_rows.protect_on_cpu()
        given: Any = options
        roles = _NixlRoles(vllm_config, given)
        config = copy.copy(vllm_config)
        config.model_config = copy.copy(vllm_config.model_config)
        config.model_config.model = f"prefillshare:{roles.prefill_id.digest}"
        NixlBaseConnector.__init__(self, config, role, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = TicketScheduler(
                config, self.engine_id, kv_cache_config, roles
            )
            logger.info("NIXL %s, %s", transfer.kv_role, roles.prefill_id)
        else:
            self.connector_worker = ClaimingWorker(
                config, self.engine_id, kv_cache_config, options.claim_timeout_s
            )
