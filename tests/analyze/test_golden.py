"""Which regions does each model of the zoo have, and why are the others held?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qpass.analyze import Region, rotatable_regions
from tests.captured import folded
from tests.zoo import ZOO


def line(region: Region) -> str:
    reasons = "; ".join(dict.fromkeys(pin.why for pin in region.pins))
    shape = f"{region.heads} x {region.width}"
    return f"{region.name}  {region.group.name}  {shape}  {reasons or 'free'}"


@pytest.mark.parametrize("name", [s.name for s in ZOO])
def test_regions_of_a_folded_model(name: str, golden: Callable[[str, str], None]) -> None:
    regions = rotatable_regions(folded(name).folded)
    golden(f"regions_{name}", "".join(line(region) + "\n" for region in regions))
