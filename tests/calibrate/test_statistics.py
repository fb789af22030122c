"""Are sums over batches those of all rows, whichever of them are asked for?"""

from __future__ import annotations

import pytest
import torch

from qpass.calibrate.outputs import surprise
from qpass.calibrate.statistics import Statistics
from qpass.rounding import Statistic

HESSIANS = (Statistic.HESSIAN, Statistic.HELD_HESSIAN)


@pytest.mark.parametrize("width", [1, 5, 256, 300, 700])
@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("wanted", [HESSIANS, HESSIANS[:1], HESSIANS[1:], HESSIANS[::-1]])
def test_hessians_are_sums_of_squares(
    wanted: tuple[Statistic, ...], batches: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    values = [torch.randn(2, 7, width, generator=generator) for _ in range(batches)]
    kept = [torch.rand(2, 7, generator=generator) < 0.8 for _ in range(batches)]
    weights = [torch.rand(14, generator=generator) for _ in range(batches)]
    found = Statistics(wanted, batches)
    rows = []
    for at, (x, k, w) in enumerate(zip(values, kept, weights, strict=True)):
        found.add(at, x, x, k, w)
        rows.append((x.double() * w.double().sqrt().reshape(2, 7, 1))[k])
    held = rows[0][len(rows[0]) // 2 :] if batches == 1 else torch.cat(rows[1::2])
    result = found.result()
    assert result.keys() == set(wanted)
    for statistic, want in zip(HESSIANS, (torch.cat(rows), held), strict=True):
        if statistic in wanted:
            got = result[statistic]
            assert torch.equal(got, got.mT)
            torch.testing.assert_close(got, want.mT @ want, rtol=1e-4, atol=1e-4)


def test_what_is_drawn_is_drawn_as_often_as_it_is_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    likely = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    rows = likely.log().expand(20_000, 6).clone().requires_grad_()
    surprise(rows, generator).backward()
    assert rows.grad is not None
    # the gradient of each row is its distribution, less one where it was drawn
    drawn = (likely - rows.grad).mean(0)
    torch.testing.assert_close(drawn, likely, rtol=0, atol=0.02)
    assert drawn[[0, 2, 5]].abs().max() == 0
