"""`turbo-distill train CONFIG --dry-run`: memory, time and disk that a recipe would take, from the
configuration alone. Parameter counts are exact; the rest are estimates, whose arithmetic is in the
docstrings here. `python -m benchmarks.dry_run CONFIG` holds them against a count of real steps on
meta tensors.
"""

from .plan import plan_text, plan_values

__all__ = ["plan_text", "plan_values"]
