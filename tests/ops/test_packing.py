"""Does every code come back from every layout, whatever the shape?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpass.errors import BadInput
from qpass.ops import packing
from qpass.ops.bits import from_bits, to_bits
from qpass.ops.packing import pack, pack_linear, tile, unpack, untile


def random_codes(n: int, k: int, bits: int, signed: bool) -> torch.Tensor:
    low = -(2 ** (bits - 1)) if signed else 0
    dtype = torch.int8 if signed else torch.uint8
    return torch.randint(low, low + 2**bits, (n, k), dtype=torch.int16).to(dtype)


@given(
    n=st.integers(1, 40),
    width=st.integers(1, 40),
    groups=st.integers(1, 5),
    kind=st.sampled_from([(8, True), (4, True), (4, False)]),
)
@settings(deadline=None, max_examples=60)
def test_codes_come_back(n: int, width: int, groups: int, kind: tuple[int, bool]) -> None:
    bits, signed = kind
    codes = random_codes(n, width * groups, bits, signed)
    packed = pack(codes, bits, groups)
    assert packed.dtype is torch.uint8
    assert packed.shape[0] == -(-n // 16)
    assert packed.shape[2] == 64
    assert torch.equal(unpack(packed, bits, codes.shape, groups, signed=signed), codes)


@pytest.mark.parametrize("kind", [(8, True), (4, True), (4, False)])
@pytest.mark.parametrize("n", [15, 16, 33, 100])
def test_a_few_rows_at_a_time_are_laid_out_alike(
    n: int, kind: tuple[int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, signed = kind
    codes = random_codes(n, 24, bits, signed)
    want = pack(codes, bits, 2)
    monkeypatch.setattr(packing, "SOME", 24 * 20)
    assert torch.equal(pack(codes, bits, 2), want)
    assert torch.equal(unpack(want, bits, codes.shape, 2, signed=signed), codes)


def test_the_first_line_is_as_documented() -> None:
    codes = random_codes(16, 8, 4, signed=False)
    line = pack(codes, 4)[0, 0]
    for n in range(16):
        for j in range(4):
            byte = int(line[4 * n + j])
            assert byte & 15 == int(codes[n, j])
            assert byte >> 4 == int(codes[n, 4 + j])
    codes = random_codes(16, 4, 8, signed=True)
    line = pack(codes, 8)[0, 0].to(torch.int16) - 128
    assert torch.equal(line.reshape(16, 4), codes.to(torch.int16))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("k", [0, 1, 2, 7, 8, 64])
def test_codes_of_few_bits_come_back(k: int, signed: bool, bits: int) -> None:
    codes = random_codes(5, k, bits, signed)
    packed = to_bits(codes, bits)
    assert packed.shape == (5, -(-k * bits // 8))
    assert torch.equal(from_bits(packed, bits, k, codes.dtype), codes)


def test_codes_lie_one_behind_the_other() -> None:
    codes = torch.tensor([[1, 2, -1, 0, 3, -4, 1, 2, -2]], dtype=torch.int8)
    (row,) = to_bits(codes, 3).tolist()
    stream = sum((int(code) & 7) << 3 * i for i, code in enumerate(codes[0]))
    assert row == list(stream.to_bytes(4, "little"))
    assert to_bits(torch.tensor([[1, -2, 3]], dtype=torch.int8), 4).tolist() == [[0xE1, 0x03]]


def test_bits_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match="9 codes of 3 bits are 4 bytes"):
        from_bits(torch.zeros(2, 3, dtype=torch.uint8), 3, 9, torch.int8)
    with pytest.raises(BadInput, match="1 to 8 bits, got 9"):
        to_bits(torch.zeros(2, 3, dtype=torch.int8), 9)


def test_tiles_come_back() -> None:
    values = torch.randn(33, 7).to(torch.float16)
    assert tile(values).shape == (3, 7, 16)
    assert torch.equal(untile(tile(values), 33), values)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match="fit 4 bits"):
        pack(torch.tensor([[8]], dtype=torch.int8), 4)
    with pytest.raises(BadInput, match="4 or 8 bits"):
        pack(torch.zeros(1, 1, dtype=torch.int8), 3)
    with pytest.raises(BadInput, match="divide into 2 groups"):
        pack(torch.zeros(1, 3, dtype=torch.int8), 8, groups=2)
    with pytest.raises(BadInput, match="uint8"):
        pack_linear(torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1), bits=8)
    with pytest.raises(BadInput, match="row_scales"):
        pack_linear(torch.zeros(2, 4, dtype=torch.int8), torch.ones(1), bits=8)
