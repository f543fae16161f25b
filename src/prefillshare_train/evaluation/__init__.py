"""Decoders on the field's own harnesses, generating as they are served."""
