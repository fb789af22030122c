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
    assert {"int4", "int8", "uint4"} <= {f.name for f in ALL}


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


def test_integers_are_the_formats_that_numpy_and_onnx_know():
    assert (FORMATS["int4"].low, FORMATS["int4"].high) == (-8, 7)
    assert (FORMATS["uint4"].low, FORMATS["uint4"].high) == (0, 15)
    assert (FORMATS["int8"].low, FORMATS["int8"].high) == (-127, 127)


def test_unknown_format_names_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'int4'"):
        FORMATS["imt4"]
