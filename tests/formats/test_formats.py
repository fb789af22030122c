"""Every registered format: codes round-trip, and nearest is nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.errors import UnknownName
from qpass.formats import FORMATS, Format

ALL = list(FORMATS)
EACH = pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)


def test_the_registry_is_not_empty():
    assert {"int2", "int3", "int4", "int8", "e2m1", "e4m3"} <= {f.name for f in ALL}


@EACH
def test_an_unsigned_partner_has_the_same_points_counted_from_zero(fmt: Format):
    if fmt.unsigned is not None:
        other = FORMATS[fmt.unsigned]
        assert torch.equal(other.decode(other.codes()), fmt.decode(fmt.codes()) - fmt.low)
        assert other.bits == fmt.bits


@EACH
def test_every_point_is_its_own_nearest(fmt: Format):
    codes = fmt.codes()
    assert codes.dtype == fmt.code_dtype
    assert len(codes.unique()) == len(codes) <= 2**fmt.bits
    assert torch.equal(fmt.encode(fmt.decode(codes)), codes)


@EACH
def test_bounds_are_reached_and_never_passed(fmt: Format):
    points = fmt.decode(fmt.codes())
    assert (points.min().item(), points.max().item()) == (fmt.low, fmt.high)


@EACH
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_nearest_is_nearest(fmt: Format, data: st.DataObject):
    reach = st.floats(2 * fmt.low - 9, 2 * fmt.high + 9, width=32)
    x = torch.tensor(data.draw(st.lists(reach, min_size=1, max_size=9)), dtype=torch.float32)
    distance = (x.double() - fmt.decode(fmt.encode(x)).double()).abs()
    every = (x.double()[:, None] - fmt.decode(fmt.codes()).double()).abs()
    assert torch.equal(distance, every.amin(1))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_in_place_gives_the_points_of_the_nearest_codes(fmt: Format, dtype: torch.dtype):
    points = fmt.decode(fmt.codes()).sort().values.to(dtype)
    middles = (points[1:] + points[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, to)) for to in (-1e9, 1e9)]
    beyond = torch.tensor([-torch.inf, torch.inf, 1e30, -1e30, 0.0, -0.0, 1e-30], dtype=dtype)
    x = torch.cat((points, middles, *beside, beyond))
    want = fmt.decode(fmt.encode(x.float() if dtype is torch.float32 else x))
    assert torch.equal(fmt.round_(x.clone()).float(), want)
    # the even one of two neighbours: every second point in the order of the line
    for low, high, got in zip(points[:-1], points[1:], fmt.round_(middles.clone()), strict=True):
        even = [p for p in (low, high) if int(fmt.encode(p[None]).view(torch.uint8)) % 2 == 0]
        assert got in even


@EACH
def test_what_a_format_says_of_its_points(fmt: Format):
    points = fmt.decode(fmt.codes()).unique()
    assert fmt.gap == points.diff().max().item()
    assert list(fmt.magnitudes) == sorted(set(points.abs().tolist()) - {0.0}, reverse=True)


def test_integers_are_the_formats_that_numpy_and_onnx_know():
    assert (FORMATS["int4"].low, FORMATS["int4"].high) == (-8, 7)
    assert (FORMATS["uint4"].low, FORMATS["uint4"].high) == (0, 15)
    assert (FORMATS["int8"].low, FORMATS["int8"].high) == (-127, 127)


def test_small_floats_are_those_of_the_specifications():
    e2m1, e4m3 = FORMATS["e2m1"], FORMATS["e4m3"]
    assert e2m1.decode(torch.arange(8)).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    every = torch.arange(256, dtype=torch.uint8)
    want = every.view(torch.float8_e4m3fn).float()
    assert torch.equal(e4m3.decode(every).nan_to_num(999), want.nan_to_num(999))
    x = torch.randn(9999, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(e4m3.encode(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert e4m3.encode(torch.tensor([-0.0, -1e-9])).tolist() == [0, 0]
    assert e2m1.decode(torch.tensor([8])).tolist() == [0]


def test_unknown_format_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'int4'"):
        FORMATS["imt4"]
