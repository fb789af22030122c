"""In which type numbers are computed before they are rounded to their own."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, and float32 for every other type."""
    return torch.float64 if dtype is torch.float64 else torch.float32
