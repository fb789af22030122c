"""Does a weight that is given some rows after the other become the same codes?"""

from __future__ import annotations

import pytest
import torch

from qpass.formats import QuantSpec
from qpass.rounding import ROUNDINGS, Rounding, round_parts
from tests.rounding.layers import layer

SPECS = (
    QuantSpec("int4", 16, scale_format="float16"),
    QuantSpec("int3", 16, scale_format="float16", symmetric=False),
    QuantSpec("int8"),
    QuantSpec("int4", "tensor"),
    QuantSpec("e2m1", 16, scale_format="e8m0"),
    QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True),
)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("rounding", list(ROUNDINGS), ids=lambda r: r.name)
def test_parts_give_the_codes_of_the_whole(rounding: Rounding, spec: QuantSpec) -> None:
    one = layer(24, 32, 100, seed=3)
    stats = {statistic: one.stats[statistic] for statistic in rounding.needs}
    whole = rounding.round(one.weight, spec, stats)
    found = round_parts(rounding, one.weight.split((8, 8, 8)), spec, stats)
    # products of other shapes differ in their last bits, which may tip an entry
    same = (found.codes_nk.view(torch.uint8) == whole.codes_nk.view(torch.uint8)).double().mean()
    assert same > 0.99
    got, want = found.dequantize(torch.float64), whole.dequantize(torch.float64)
    assert float((got - want).norm() / want.norm()) < 0.02
