"""Makes our connectors known to vLLM by name; vLLM calls `register` in each of its processes."""

from __future__ import annotations

_CONNECTORS = {
    "PrefillShareStoreConnector": "prefillshare_train.engines.vllm.store_connector",
    "PrefillShareNixlConnector": "prefillshare_train.engines.vllm.nixl_connector",
}


def register() -> None:
    """Register the connectors; their modules are loaded when they are asked for."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for name, module in _CONNECTORS.items():
        # vLLM may call this more than once a process, and refuses a second registration.
        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, module, name)
