"""Shared prefill on stock vLLM: connectors, a guard, a router, and what starts them together."""
