"""Training data: prompts and images in, a cache of embeddings and latents out.

sources, prompts, huggingface -> plan -> build -> shards, index -> prepared, which training reads.
"""
