"""A LoRA as a file: opened, converted, described, written."""
