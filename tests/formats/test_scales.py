"""Every registered format of scales: what is stored is stored, and rounding goes the right way."""

import pytest
import torch

from qpass.errors import UnknownName
from qpass.formats import SCALES, ScaleFormat

ALL = list(SCALES)
EACH = pytest.mark.parametrize("scales", ALL, ids=lambda s: s.name)
ONLY_POSITIVE = {"e4m3", "e8m0"}


INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def numbers(scales: ScaleFormat) -> torch.Tensor:
    """Neighbouring numbers of a format around 1, increasing, in float64."""
    one = torch.ones(1).to(scales.dtype)
    patterns = one.view(INTS[one.element_size()]) + torch.arange(-20, 20)
    return patterns.to(INTS[one.element_size()]).view(scales.dtype).double()


@EACH
def test_what_is_stored_is_stored_again_and_survives_its_type(scales: ScaleFormat):
    x = numbers(scales).float()
    assert (x.diff() > 0).all()
    for stored in (scales.stored, scales.stored_below, scales.stored_above):
        assert torch.equal(stored(x), x)
    assert torch.equal(x.to(scales.dtype).float(), x)
    assert scales.bits == 8 * x.to(scales.dtype).element_size()


@EACH
@pytest.mark.parametrize("at", [0.1, 0.4, 0.6, 0.9])
def test_the_nearest_is_stored_or_the_one_below_or_above(scales: ScaleFormat, at: float):
    x = numbers(scales)
    between = x[:-1] + at * x.diff()
    assert torch.equal(scales.stored(between).double(), x[:-1] if at < 0.5 else x[1:])
    assert torch.equal(scales.stored_below(between).double(), x[:-1])
    assert torch.equal(scales.stored_above(between).double(), x[1:])


@EACH
def test_extremes_stay_finite(scales: ScaleFormat):
    top = scales.stored(torch.tensor([scales.top]))
    assert top.item() == scales.top
    tiny = scales.stored(torch.tensor([0.0, 1e-30]))
    assert tiny.isfinite().all()
    assert (tiny < 1e-3).all()
    if scales.name in ONLY_POSITIVE:
        assert not scales.signed
        large = torch.tensor([-3.0, 1e38, torch.finfo(torch.float32).max])
        assert scales.stored(large)[0] <= scales.stored(torch.zeros(1))
        assert scales.stored(large)[1:].tolist() == [min(2.0**126, scales.top), scales.top]
    else:
        assert scales.stored(torch.tensor([-3.0])).item() == -3


def test_e8m0_holds_the_powers_of_two():
    x = torch.tensor([1.0, 1.49, 1.51, 2.0, 2.99, 3.01, 0.124])
    assert SCALES["e8m0"].stored(x).tolist() == [1, 1, 2, 2, 2, 4, 0.125]


def test_unknown_scale_formats_suggest_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'e8m0'"):
        SCALES["e8mo"]
