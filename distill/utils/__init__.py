"""Small helpers that know nothing of distillation."""
