"""Serving: one prefill and one KV cache for every decoder."""
