"""Base models: what a family is, its transformer, VAE, text encoder, sizes, and its sampling."""
