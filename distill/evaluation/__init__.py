"""Metrics of images: a LoRA beside its teacher, gates of previews, prompt score."""
