"""Do the operators mean what their documentation says, checked against naive float64?"""

import itertools

import pytest
import torch
from torch import Tensor

import qpass.ops as ops
from qpass.errors import BadInput
from qpass.ops.library import specification
from qpass.ops.packing import tile

# one float32 rounding for each of a few hundred sums of numbers near 1
FLOAT32_SUM = 2e-5


def sylvester(power: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < power:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h / power**0.5


def orthonormal(m: int) -> Tensor:
    return torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q.contiguous()


def transform(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 2, (n,)).double() * 2 - 1, orthonormal(m)


@pytest.mark.parametrize(
    ("blocks", "m", "power"), [(1, 1, 1), (1, 3, 4), (2, 5, 8), (3, 1, 16), (1, 9, 64), (4, 2, 1)]
)
def test_hadamard_is_the_matrix(blocks: int, m: int, power: int) -> None:
    n = blocks * m * power
    signs, factor = transform(n, m)
    x = torch.randn(2, 3, n, dtype=torch.float64)
    matrix = torch.kron(factor, sylvester(power))
    want = ((x * signs).reshape(2, 3, blocks, -1) @ matrix).reshape(x.shape)
    torch.testing.assert_close(
        specification("hadamard")(x, signs, factor, power), want, atol=1e-12, rtol=0
    )
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 2**-5), (torch.float16, 2**-8)):
        got = specification("hadamard")(x.to(dtype), signs.float(), factor.float(), power)
        assert got.dtype is dtype
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=2**-7)


def test_hadamard_refuses_parts_that_do_not_fit() -> None:
    x, factor = torch.ones(2, 12), torch.eye(3)
    for signs, power, why in (
        (torch.ones(12), 3, "power of two"),
        (torch.ones(11), 4, "one entry per channel"),
        (torch.ones(12), 8, "no multiple of the block"),
    ):
        with pytest.raises(BadInput, match=why):
            specification("hadamard")(x, signs, factor, power)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_quantized_to_the_nearest_code(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 37).to(dtype)
    codes, scales = specification("quantize_rows")(x, bits)
    assert codes.dtype is torch.int8
    assert scales.dtype is torch.float32
    assert scales.shape == (3, 5, 1)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    error = (codes * scales.double() - x.double()).abs() / scales
    assert error.max() <= 0.5 + 1e-4


def test_rotation_happens_before_quantizing_and_in_float32() -> None:
    signs, factor = transform(24, 3)
    x = torch.randn(4, 24).to(torch.bfloat16)
    wide = specification("hadamard")(x.float(), signs.float(), factor.float(), 8)
    codes, scales = specification("quantize_rows")(x, 8, signs.float(), factor.float(), 8)
    want_codes, want_scales = specification("quantize_rows")(wide, 8)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scales, want_scales)


def test_rows_of_zeros_and_rows_that_are_not_finite() -> None:
    x = torch.randn(5, 8)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 4] = -torch.inf
    x[3] = 1e-42
    codes, scales = specification("quantize_rows")(x, 8)
    values = codes * scales
    assert torch.equal(values[0], torch.zeros(8))
    assert values[1].isnan().all()
    assert values[2].isnan().all()
    assert torch.equal(values[3], torch.zeros(8))
    assert values[4].isfinite().all()
    empty_codes, empty_scales = specification("quantize_rows")(torch.empty(0, 8), 8)
    assert empty_codes.shape == (0, 8)
    assert empty_scales.shape == (0, 1)


def random_linear(
    n: int, k: int, groups: int | None, bits: int, offsets: bool
) -> tuple[ops.PackedLinear, Tensor]:
    """A packed weight and its dense float64 value."""
    unsigned = bits == 4 and offsets
    low = 0 if unsigned else -(2 ** (bits - 1))
    q = torch.randint(low, low + 2**bits, (n, k), dtype=torch.int16)
    codes = q.to(torch.uint8 if unsigned else torch.int8)
    rows = torch.rand(n) + 0.5
    s = None if groups is None else (torch.rand(n, groups) + 0.5).to(torch.float16)
    m = torch.randn(n, groups or 1).to(torch.float16) if offsets else None
    w = q.double().reshape(n, groups or 1, -1)
    if s is not None:
        w = w * s.double()[..., None]
    if m is not None:
        w = w + m.double()[..., None]
    packed = ops.pack_linear(codes, rows, s, m, bits=bits)
    return packed, w.reshape(n, k) * rows.double()[:, None]


def weight(p: ops.PackedLinear, bias: Tensor | None) -> tuple[object, ...]:
    """The arguments of the linear operators that come from a packed weight."""
    scales = (p.group_scales, p.group_offsets)
    return p.weight, p.row_scales, *scales, bias, p.bits, p.in_features, p.out_features


KINDS = [
    (8, None, False),
    (8, 3, False),
    (8, 3, True),
    (4, None, False),
    (4, 3, False),
    (4, 3, True),
]


@pytest.mark.parametrize(("bits", "groups", "offsets"), KINDS)
@pytest.mark.parametrize(("n", "k"), [(1, 3), (17, 33), (16, 96)])
@pytest.mark.parametrize("biased", [True, False])
def test_linear_is_the_dense_product(
    n: int, k: int, bits: int, groups: int | None, offsets: bool, biased: bool
) -> None:
    packed, w = random_linear(n, k, groups, bits, offsets)
    bias = torch.randn(n) if biased else None
    x = torch.randn(2, 3, k)
    want = torch.nn.functional.linear(x.double(), w, None if bias is None else bias.double())
    reach = (x.double().abs() @ w.abs().T).max()
    got = specification("linear.real")(x, *weight(packed, bias))
    assert (got - want).abs().max() <= FLOAT32_SUM * reach
    codes, scales = specification("quantize_rows")(x, 8)
    got = specification("linear.codes")(codes, scales, *weight(packed, bias), torch.float32)
    value = codes.double() * scales.double()
    want = torch.nn.functional.linear(value, w, None if bias is None else bias.double())
    assert (got - want).abs().max() <= FLOAT32_SUM * reach


def test_linear_of_nothing_is_nothing() -> None:
    packed, _ = random_linear(5, 8, None, 8, offsets=False)
    assert ops.linear_real(torch.empty(0, 8), packed, None).shape == (0, 5)
    codes, scales = specification("quantize_rows")(torch.empty(2, 0, 8), 8)
    assert specification("linear.codes")(
        codes, scales, *weight(packed, None), torch.float16
    ).shape == (2, 0, 5)


def test_embedding_looks_rows_up() -> None:
    codes = torch.randint(-127, 128, (11, 6), dtype=torch.int8)
    scales = torch.rand(11)
    indices = torch.tensor([[0, 10], [3, 3]])
    want = codes[indices] * scales[indices][..., None]
    assert torch.equal(specification("embedding")(indices, codes, scales, torch.float32), want)
    assert specification("embedding")(indices, codes, scales, torch.float16).dtype is torch.float16
    with pytest.raises(IndexError):
        specification("embedding")(torch.tensor([11]), codes, scales, torch.float32)
    with pytest.raises(IndexError):
        specification("embedding")(torch.tensor([-1]), codes, scales, torch.float32)


def calls() -> list[tuple[str, object, tuple[object, ...]]]:
    """One call of each operator for each kind of argument."""
    signs, factor = torch.ones(12), orthonormal(3).float()
    x = torch.randn(2, 12)
    found: list[tuple[str, object, tuple[object, ...]]] = [
        ("hadamard", torch.ops.qpass.hadamard.default, (x, signs, factor, 4)),
        ("quantize", torch.ops.qpass.quantize_rows.default, (x, 8, None, None, 1)),
        ("rotate", torch.ops.qpass.quantize_rows.default, (x, 4, signs, factor, 4)),
        ("clip", torch.ops.qpass.quantize_rows.clipped, (x, -8, 7, 0.8, signs, factor, 4)),
        ("offset", torch.ops.qpass.quantize_rows.offset, (x, 0, 15, 1.0, None, None, 1)),
        ("static", torch.ops.qpass.quantize_rows.static, (x, 8, 0.1, 3, signs, factor, 4)),
        (
            "fake clip",
            torch.ops.qpass.fake_quantize.clipped,
            (x, "int4", 4, "float32", False, True, 0.8, None, None, 1),
        ),
        (
            "fake static",
            torch.ops.qpass.fake_quantize.static,
            (x, "e4m3", 0.1, 0, True, signs, factor, 4),
        ),
        (
            "embedding",
            torch.ops.qpass.embedding.default,
            (
                torch.tensor([1, 0]),
                torch.ones(3, 4, dtype=torch.int8),
                torch.ones(3),
                torch.float16,
            ),
        ),
    ]
    for bits, groups, offsets in KINDS:
        p, _ = random_linear(5, 12, groups, bits, offsets)
        w = weight(p, torch.ones(5))
        name = f"{bits}-{groups}-{offsets}"
        codes = torch.ones(2, 12, dtype=torch.int8)
        found += [
            (f"real-{name}", torch.ops.qpass.linear.real, (x, *w)),
            (
                f"codes-{name}",
                torch.ops.qpass.linear.codes,
                (codes, torch.ones(2, 1), *w, torch.bfloat16),
            ),
        ]
    return found


@pytest.mark.parametrize(
    ("operator", "arguments"), [c[1:] for c in calls()], ids=[c[0] for c in calls()]
)
def test_schema_and_shapes_agree_with_the_specification(
    operator: object, arguments: tuple[object, ...]
) -> None:
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_export_keeps_operators_whole_and_sizes_symbolic() -> None:
    packed, _ = random_linear(5, 12, 3, 4, offsets=True)

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            codes, scales = ops.quantize_rows(x, 8)
            return ops.linear_codes(codes, scales, packed, None, x.dtype)

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Net(), (torch.randn(3, 12),), dynamic_shapes=({0: rows},))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"qpass.quantize_rows.default", "qpass.linear.codes"} <= targets
    x = torch.randn(7, 12)
    assert torch.equal(program.module()(x), Net()(x))


def test_shapes_that_do_not_fit_are_refused() -> None:
    packed, _ = random_linear(5, 12, 3, 4, offsets=True)
    with pytest.raises(BadInput, match="13 features"):
        specification("linear.real")(torch.randn(2, 13), *weight(packed, None))
    with pytest.raises(BadInput, match="bias"):
        specification("linear.real")(torch.randn(2, 12), *weight(packed, torch.randn(4)))


def test_every_pair_of_signs_is_covered() -> None:
    kinds = {(bits, offsets) for bits, _, offsets in KINDS}
    assert kinds == set(itertools.product((4, 8), (True, False)))
    assert tile(torch.ones(1, 1)).dtype is torch.float16


@pytest.mark.parametrize("compiled", [False, True])
def test_a_transform_has_gradients(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 24, dtype=torch.float64, generator=generator, requires_grad=True)
    signs = torch.where(torch.arange(24) % 3 == 0, -1.0, 1.0).double()
    factor = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    call = torch.compile(ops.hadamard, backend="eager") if compiled else ops.hadamard
    assert torch.autograd.gradcheck(lambda x: call(x, signs, factor, 4), x)
    with torch.no_grad():
        assert torch.allclose(call(x, signs, factor, 4), ops.hadamard(x, signs, factor, 4))
