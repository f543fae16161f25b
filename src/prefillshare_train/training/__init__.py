"""Training on a frozen base's prompt cache."""
