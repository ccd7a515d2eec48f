"""The toy Qwen-Image that comes with the package: weights, data, judge, and how it was made."""
