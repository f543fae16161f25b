"""The router in front of stock vLLM instances: our own server over other people's engines."""
