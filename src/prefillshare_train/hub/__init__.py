"""Models in and out: decoders loaded, exported and pushed; base checkpoints converted."""
