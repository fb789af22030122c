"""Are the tiles that the linear kernels choose legal on every target?"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton")

from qpass._kernels.gpu import linear_codes_matrix, linear_real_matrix, tiles
from qpass._kernels.gpu.packed import Packed
from qpass.runtime.target import TARGETS, Target

SEED = 20261127


def shapes() -> list[tuple[Packed, int]]:
    draw = random.Random(SEED)
    made: list[tuple[Packed, int]] = []
    for _ in range(60):
        bits, groups = draw.choice((4, 8)), draw.choice((1, 1, 3, 8, 32, 112))
        width = draw.choice((5, 16, 24, 32, 36, 64, 96, 128, 1536))
        lines = groups * -(-width * bits // 32)
        n, m = draw.choice((1, 17, 4096, 14336)), draw.choice((1, 2, 16, 33, 129, 4096))
        made.append((Packed(bits, groups * width, n, lines, groups, groups > 1), m))
    return made


@pytest.mark.parametrize("on", TARGETS, ids=lambda target: target.name)
def test_tiles_are_legal(on: Target) -> None:
    for packed, m in shapes():
        chosen = [(linear_codes_matrix.configure(packed, m, on), 1)]
        for dtype in (torch.float32, torch.bfloat16):
            chosen.append((linear_real_matrix.configure(packed, m, dtype, on), dtype.itemsize))
        for tile, size in chosen:
            shares = tile.shares
            chunks = packed.groups * -(-packed.group_lines // tile.lines)
            assert tiles.shared(tile, packed.bits, size) <= on.shared
            assert shares == 1 or shares <= chunks
            assert tile.lines >= tiles.LEAST
            assert tile.lines & (tile.lines - 1) == 0


def test_few_rows_of_a_small_layer_are_shared_out() -> None:
    h = next(t for t in TARGETS if t.name == "sm_90")
    small = Packed(4, 4096, 1024, 512, 32, True)
    large = Packed(4, 4096, 131072, 512, 32, True)
    assert linear_real_matrix.configure(small, 16, torch.bfloat16, h).shares > 1
    assert linear_real_matrix.configure(large, 16, torch.bfloat16, h).shares == 1


@pytest.mark.parametrize(
    ("lines", "group_lines", "want"),
    [(16, 16, 16), (16, 8, 8), (16, 12, 16), (16, 5, 8), (32, 2, 8), (16, 48, 16), (32, 24, 8)],
)
def test_steps_end_where_groups_do(lines: int, group_lines: int, want: int) -> None:
    h = next(t for t in TARGETS if t.name == "sm_90")
    tile = tiles.Tile(16, 64, lines, 4, 4, True)
    assert tiles.fit(tile, group_lines, h).lines == want
