"""Training data: prompts and images in, a cache of embeddings and latents out.

sources, prompts, huggingface -> chunks -> builder -> shards, index -> dataset for training.
"""
