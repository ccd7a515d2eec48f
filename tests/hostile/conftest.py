"""Hostile inputs need Linux: its limits of memory, and processes that fork."""

from __future__ import annotations

import sys

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
