"""What a QuantSpec accepts, refuses and costs."""

import pytest
import torch

from qpass.errors import BadInput, UnknownName
from qpass.formats import QuantizedTensor, QuantSpec

GROUPED = QuantSpec("int4", 32, scale_format="float16", symmetric=False)
MXFP4 = QuantSpec("e2m1", 32, scale_format="e8m0")
NVFP4 = QuantSpec("e2m1", 16, scale_format="e4m3", tensor_scale=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block", 0),
        ("block", -32),
        ("block", True),
        ("block", 1.5),
        ("block", "row"),
        ("axis", "last"),
        ("axis", True),
        ("scale_format", "float8"),
        ("symmetric", 1),
        ("dynamic", "yes"),
        ("format", 4),
        ("format", "uint4"),
        ("tensor_scale", 1),
    ],
)
def test_a_bad_field_names_itself_and_its_value(key: str, value: object):
    with pytest.raises(BadInput, match=key) as caught:
        QuantSpec(**{"format": "int4", key: value})
    assert repr(value) in str(caught.value)
    assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("symmetric", {"format": "e2m1", "symmetric": False}),
        ("symmetric", {"format": "e4m3", "block": 32, "symmetric": False}),
        ("symmetric", {"format": "int4", "scale_format": "e8m0", "symmetric": False}),
        ("tensor_scale", {"format": "e2m1", "block": 16, "scale_format": "e4m3"}),
        ("tensor_scale", {"format": "e2m1", "scale_format": "e4m3", "tensor_scale": True}),
        ("tensor_scale", {"format": "e2m1", "block": "tensor", "tensor_scale": True}),
        ("tensor_scale", {"format": "int4", "block": 32, "tensor_scale": True}),
    ],
)
def test_fields_that_do_not_go_together_are_refused_by_name(field: str, fields: dict[str, object]):
    with pytest.raises(BadInput, match=rf"^{field} = .*expected"):
        QuantSpec.read(fields)


def test_tables_name_a_tensor_scale_only_where_there_is_one():
    assert "tensor_scale" not in GROUPED.table()
    assert NVFP4.table()["tensor_scale"] is True
    for spec in (MXFP4, NVFP4, GROUPED):
        assert QuantSpec.read(spec.table()) == spec


def test_widths_that_blocks_do_not_divide_get_scales_that_need_no_factor():
    for spec in (MXFP4, NVFP4):
        assert spec.per_channel() == QuantSpec("e2m1")


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownName, match="int4"):
        QuantSpec("int5")
    with pytest.raises(UnknownName, match="did you mean 'symmetric'"):
        QuantSpec.read({"format": "int4", "symetric": True})
    with pytest.raises(BadInput, match="format is missing"):
        QuantSpec.read({"block": 32})


def test_table_round_trip_and_changes():
    assert QuantSpec.read(GROUPED.table()) == GROUPED
    assert QuantSpec.read({"block": 64}, GROUPED).block == 64
    assert QuantSpec.read({"block": 64}, GROUPED).symmetric is False


def test_bits_per_weight_counts_scales_and_offsets():
    assert GROUPED.bits_per_weight(64) == 4 + 32 / 32 + 32 / 64
    assert QuantSpec("int8").bits_per_weight(64) == 8 + 32 / 64
    assert MXFP4.bits_per_weight(64) == 4 + 8 / 32
    assert NVFP4.bits_per_weight(64) == 4 + 8 / 16
    assert NVFP4.bits_per_weight(64, rows=10) == 4 + 8 / 16 + 32 / 640


def test_a_width_that_blocks_do_not_divide_is_refused_with_a_reason():
    assert GROUPED.supports((3, 64)) is None
    assert "48" in (GROUPED.supports((3, 48)) or "")
    assert "axes" in (GROUPED.supports((3, 64, 2)) or "")
    assert GROUPED.per_channel().supports((3, 48)) is None


def quantized(n: int, k: int, spec: QuantSpec) -> QuantizedTensor:
    groups = spec.scales.stored(torch.rand(n, spec.groups(k))).to(spec.scale_dtype)
    codes = spec.codes.codes()
    factors = 2.0 ** torch.randint(-3, 3, (n,))
    return QuantizedTensor(
        spec,
        codes[torch.randint(0, len(codes), (n, k))],
        factors[:1].expand(n) if spec.one_factor else factors,
        groups if spec.grouped else None,
        -groups if spec.grouped and not spec.symmetric else None,
    )


@pytest.mark.parametrize(
    "spec",
    [
        GROUPED,
        QuantSpec("int4", 16, scale_format="float16"),
        QuantSpec("int8", "channel"),
        QuantSpec("int8", "tensor"),
        QuantSpec("int8", "channel", symmetric=False),
        QuantSpec("int4", "channel"),
        QuantSpec("int3", 32, scale_format="bfloat16"),
        QuantSpec("int2", 32, scale_format="float16", symmetric=False),
        QuantSpec("e4m3"),
        MXFP4,
        NVFP4,
    ],
    ids=str,
)
def test_dequantize_is_the_equation_and_bytes_are_exact(spec: QuantSpec):
    n, k = 5, 96
    tensor = quantized(n, k, spec)
    got = tensor.dequantize(torch.float64)
    for i in range(n):
        for j in range(0, k, 7):
            value = float(spec.codes.decode(tensor.codes_nk[i, j]))
            g = j // (k // spec.groups(k))
            if tensor.group_scales_ng is not None:
                value *= float(tensor.group_scales_ng[i, g])
            if tensor.group_offsets_ng is not None:
                value += float(tensor.group_offsets_ng[i, g])
            value *= float(tensor.row_scales_n[i])
            assert got[i, j].item() == pytest.approx(value, rel=1e-6, abs=1e-9)
    assert tensor.bytes * 8 == pytest.approx(spec.bits_per_weight(k, n) * n * k)
    assert tensor.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_odd_rows_of_nibbles_are_padded_to_bytes():
    assert quantized(3, 5, QuantSpec("int4")).bytes == 3 * 3 + 3 * 4


def test_parts_that_do_not_fit_the_spec_are_refused():
    good = quantized(4, 64, GROUPED)
    parts = (good.codes_nk, good.row_scales_n, good.group_scales_ng, good.group_offsets_ng)
    for index, bad, why in (
        (0, good.codes_nk[:, :48], "multiple"),
        (0, good.codes_nk.to(torch.int8), "expected torch.uint8"),
        (1, good.row_scales_n[:3], "shape"),
        (1, good.row_scales_n.double(), "float32"),
        (2, None, "missing"),
        (3, None, "missing"),
        (3, torch.zeros(4, 3, dtype=torch.float16), "shape"),
    ):
        changed = [*parts[:index], bad, *parts[index + 1 :]]
        with pytest.raises(BadInput, match=why):
            QuantizedTensor(GROUPED, *changed)
    with pytest.raises(BadInput, match="one for all rows"):
        QuantizedTensor(MXFP4, quantized(2, 64, MXFP4).codes_nk, torch.tensor([1.0, 2.0]))
    with pytest.raises(BadInput, match="has none"):
        QuantizedTensor(QuantSpec("int8"), good.codes_nk.to(torch.int8), *parts[1:3])
