"""What a user may ask for, and what will be done."""

from qpass.plan.capability import Capability
from qpass.plan.plan import Changed, Declined, Online, Paired, Plan, Quantized, Rotated
from qpass.plan.recipe import Recipe, Role, preset_names

__all__ = [
    "Capability",
    "Changed",
    "Declined",
    "Online",
    "Paired",
    "Plan",
    "Quantized",
    "Recipe",
    "Role",
    "Rotated",
    "preset_names",
]
