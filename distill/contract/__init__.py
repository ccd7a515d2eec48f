"""What the training side and the ComfyUI side share: spec, schedule, samplers, LoRA keys, metadata.

Imports the standard library, torch and safetensors only, so that loading the node pack is free.
"""
