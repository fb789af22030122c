"""Do the modules that replace linears and embeddings compute, store, cast and copy as promised?"""

from __future__ import annotations

import copy
import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qpass.errors import BadInput
from qpass.formats import QuantSpec
from qpass.ops import pack_linear
from qpass.quantize.containers import hold
from qpass.rotations import Transform
from qpass.rounding import ROUNDINGS
from qpass.targets.layers import QuantizedLinear, RotatedLinear
from qpass.targets.tables import QuantizedEmbedding

ROOT = Path(__file__).parents[2]
N, K = 19, 24
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TURN = Transform("hadamard", K, seed=3)

# relative to the largest entry: sums of K products, each rounded to the type of the input
SUMS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quantized(bits: int = 4, groups: int = 3, offsets: bool = False, **options) -> QuantizedLinear:
    g = generator()
    low, high = (0, 16) if bits == 4 and offsets else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    kind = torch.uint8 if low == 0 else torch.int8
    codes = torch.randint(low, high, (N, K), generator=g, dtype=kind)
    scales = torch.rand(N, groups, generator=g).half() + 0.5 if groups else None
    shifts = torch.randn(N, groups, generator=g).half() if offsets else None
    packed = pack_linear(codes, torch.rand(N, generator=g) + 0.1, scales, shifts, bits=bits)
    options.setdefault("dtype", torch.float32)
    return QuantizedLinear(packed, torch.randn(N, generator=g), **options)


def small(spec: QuantSpec, activation: QuantSpec | None = None, **options) -> QuantizedLinear:
    g = generator()
    weight = torch.randn(N, K, generator=g)
    options.setdefault("dtype", torch.float32)
    held, bias = hold(ROUNDINGS["nearest"].round(weight, spec, {})), torch.randn(N, generator=g)
    return QuantizedLinear(held, bias, spec=spec, activation=activation, **options)


MXFP4 = QuantSpec("e2m1", 8, scale_format="e8m0")
NVFP4 = QuantSpec("e2m1", 8, scale_format="e4m3", tensor_scale=True)
INT3 = QuantSpec("int3", 8, scale_format="float16", symmetric=False)
LAYERS = {
    "int8": lambda **o: quantized(8, 0, **o),
    "int4": lambda **o: quantized(4, 0, **o),
    "int4 groups": lambda **o: quantized(4, 3, activation_bits=8, **o),
    "int4 offsets": lambda **o: quantized(4, 3, offsets=True, **o),
    "int4 online": lambda **o: quantized(4, 3, transform=TURN, **o),
    "int3 offsets": lambda **o: small(INT3, activation_bits=8, **o),
    "mxfp4": lambda **o: small(MXFP4, dataclasses.replace(MXFP4, dynamic=True), **o),
    "nvfp4 online": lambda **o: small(NVFP4, transform=TURN, **o),
    "e4m3": lambda **o: small(QuantSpec("e4m3"), **o),
    "e4m3 online": lambda **o: small(
        QuantSpec("e4m3"), QuantSpec("int8", dynamic=True), transform=TURN, **o
    ),
    "int8 activations online": lambda **o: quantized(8, 2, activation_bits=8, transform=TURN, **o),
}


def relative(want: Tensor, got: Tensor) -> float:
    want, got = want.detach().double(), got.detach().double()
    return float((want - got).abs().max() / want.abs().max())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_it_multiplies_by_its_weight(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name](dtype=dtype)
    x = torch.randn(2, 5, K, generator=generator(1), dtype=torch.float64).to(dtype)
    assert layer.bias is not None
    weight = copy.deepcopy(layer).double().weight
    got = layer(x)
    assert got.dtype is dtype
    want = nn.functional.linear(x.double(), weight, layer.bias.double())
    # 8-bit rows: half a step of 127 in each of K products
    limit = SUMS[dtype] + (0.02 if layer.activation_bits or layer.activation else 0.0)
    if layer.activation is not None and layer.activation.codes.bits == 4:
        limit = 0.2
    assert relative(want, got) <= limit
    assert layer.weight.dtype is dtype


@pytest.mark.parametrize("name", LAYERS)
def test_casts_leave_integers_and_scales_alone(name: str) -> None:
    layer = LAYERS[name]()
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.half().bfloat16().to(torch.float32)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], value)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("through", ["deepcopy", "pickle", "state_dict"])
def test_copies_compute_the_same(name: str, through: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(3, K, generator=generator(1))
    want = layer(x)
    if through == "deepcopy":
        other = copy.deepcopy(layer)
    elif through == "pickle":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = LAYERS[name]()
        for buffer in other.buffers():
            if buffer is not other.bias and other.online is None:
                buffer.zero_()
        other.load_state_dict(layer.state_dict())
    for buffer in layer.buffers():
        buffer.zero_()
    assert torch.equal(other(x), want)


def test_a_state_that_does_not_fit_is_refused() -> None:
    layer = quantized()
    state = layer.state_dict()
    codes = state.pop("codes")
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"codes is torch.uint8 \(19, 11\)"):
        layer.load_state_dict({**state, "codes": codes[:, 1:]})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**state, "codes": codes, "weight": codes})


def test_activations_are_quantized_in_one_way() -> None:
    rows = QuantSpec("int8", dynamic=True)
    with pytest.raises(BadInput, match=r"^activation: given beside activation_bits"):
        small(INT3, rows, activation_bits=8)
    with pytest.raises(BadInput, match=r"^activation_bits: this weight is no integers"):
        small(QuantSpec("e4m3"), activation_bits=8)


def test_four_bits_take_half_a_byte_in_memory_and_in_files() -> None:
    layer = quantized(4, 0)
    assert layer.state_dict()["codes"].nbytes == N * K // 2
    # rows come in blocks of 16
    assert layer.packed_weight.nbytes == 32 * K // 2
    held = [t for t in layer.__dict__["_buffers"].values() if t is not None]
    assert sum(t.nbytes for t in held if t.dtype is torch.uint8) == layer.packed_weight.nbytes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_rotated_linear_is_the_linear_it_came_from(dtype: torch.dtype, transposed: bool) -> None:
    g = generator()
    weight = torch.randn(N, K, generator=g, dtype=torch.float64)
    bias = torch.randn(N, generator=g, dtype=torch.float64)
    turned = weight @ TURN.matrix()[0]
    layer = RotatedLinear(turned.to(dtype), bias.to(dtype), transform=TURN, transposed=transposed)
    x = torch.randn(2, 5, K, generator=g, dtype=torch.float64)
    assert relative(nn.functional.linear(x, weight, bias), layer(x.to(dtype))) <= SUMS[dtype]
    shown = layer.weight.mT if transposed else layer.weight
    assert relative(weight, shown) <= SUMS[dtype]
    assert layer.half().online.factor.dtype.itemsize >= 4
    assert set(layer.state_dict()) == {"rotated", "bias"}


def test_an_embedding_looks_rows_up() -> None:
    g = generator()
    codes = torch.randint(-127, 128, (13, 6), generator=g, dtype=torch.int8)
    layer = QuantizedEmbedding(codes, torch.rand(13, generator=g), dtype=torch.bfloat16)
    ids = torch.randint(0, 13, (2, 3), generator=g)
    assert torch.equal(layer(ids), layer.weight[ids])
    assert layer(ids).dtype is torch.bfloat16
    assert layer.float()(ids).dtype is torch.float32
    assert layer.codes.dtype is torch.int8
    other = QuantizedEmbedding(torch.zeros_like(codes), torch.zeros(13), dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(ids), layer(ids))


def test_a_transform_of_another_width_is_refused() -> None:
    with pytest.raises(BadInput, match="width"):
        quantized(transform=Transform("hadamard", 2 * K))
    with pytest.raises(BadInput, match="no fast form"):
        quantized(transform=Transform("haar", K))


@pytest.mark.parametrize(
    "name", ["int4 groups", "int8 activations online", "mxfp4", "e4m3", "e4m3 online"]
)
def test_it_can_be_compiled_and_exported(name: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(3, K, generator=generator(1))
    want = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(layer, (x,)).module()
    with torch.no_grad():
        assert torch.equal(compiled(x), want)
        assert torch.equal(exported(x), want)


LOADED = """
import sys
from qpass.rotations import Transform
from qpass.runtime import native
from qpass.targets.layers import OnlineTransform
import torch
before = native.load.cache_info().currsize
OnlineTransform(Transform("hadamard", 8), torch.float32)
print(before, native.load.cache_info().currsize)
"""


def test_a_layer_brings_the_kernels() -> None:
    # a process that only loads a checkpoint asks for nothing else that would
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["0", "1"]
