"""Whether applying a fast transform keeps shapes, dtypes, gradients and the convention."""

import math

import pytest
import torch

from qpass.ops.hadamard import hadamard
from qpass.rotations import ROTATIONS, Fast, Key
from qpass.rotations.apply import apply, dense, transform_blocks

HADAMARD = ROTATIONS["hadamard"]


def test_the_convention_by_hand() -> None:
    # [m, power] = [2, 2]: coordinate 2i + j meets factor row i and H row j
    angle = 0.3
    factor = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    x = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    H = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    want = (x * signs) @ torch.kron(factor, H)
    torch.testing.assert_close(apply(Fast(signs, factor, 2), x), want)


@pytest.mark.parametrize("n", [1, 12, 35, 96, 8960])
def test_the_operator_agrees(n: int) -> None:
    fast = HADAMARD.fast(n, Key("a", 0))
    assert fast is not None
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        hadamard(x, fast.signs, fast.factor, fast.power), apply(fast, x), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 0, 24), (2, 3, 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leading_shape_and_dtype_are_kept(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    fast = HADAMARD.fast(24, Key("a", 0))
    assert fast is not None
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    y = apply(fast, x)
    assert y.shape == x.shape
    assert y.dtype == dtype
    torch.testing.assert_close(y, x @ dense(fast).to(dtype))


def test_strided_input_and_no_write_in_place() -> None:
    fast = HADAMARD.fast(48, Key("a", 0))
    assert fast is not None
    base = torch.randn(48, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = base.clone()
    torch.testing.assert_close(apply(fast, base.T), base.T @ dense(fast))
    assert torch.equal(base, before)


def test_gradients_flow() -> None:
    fast = HADAMARD.fast(12, Key("a", 0))
    assert fast is not None
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: apply(fast, t), x.requires_grad_())


@pytest.mark.parametrize("power", [1, 2, 64, 128, 4096, 8192])
def test_powers_beyond_one_dense_piece(power: int) -> None:
    n = 3 * power
    one = torch.eye(1, dtype=torch.float64)
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = transform_blocks(x, torch.ones(n, dtype=torch.float64), one, power)
    # Sylvester's matrix is symmetric and orthonormal, so it is its own inverse
    again = transform_blocks(y, torch.ones(n, dtype=torch.float64), one, power)
    torch.testing.assert_close(again, x)
    first = y.reshape(2, 3, power)[..., 0] * math.sqrt(power)
    torch.testing.assert_close(first, x.reshape(2, 3, power).sum(-1))
