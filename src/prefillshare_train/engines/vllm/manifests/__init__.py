"""What `prefillshare vllm plan` writes for a cluster, as plain values for YAML."""
