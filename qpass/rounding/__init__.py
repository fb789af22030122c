"""How weights become codes."""

from qpass.rounding.base import ROUNDINGS, Rounding, Statistic, Stats, round_parts, without_data

__all__ = ["ROUNDINGS", "Rounding", "Statistic", "Stats", "round_parts", "without_data"]
