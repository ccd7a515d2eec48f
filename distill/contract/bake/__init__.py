"""Base + few-step LoRA -> one smaller model."""
