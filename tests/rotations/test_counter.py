"""Whether random numbers are the same everywhere, and random."""

import math

import numpy as np
import pytest
import torch

from qpass.rotations import Key
from qpass.rotations.counter import _log, normals, permutation, signs, uniforms

PINNED_SIGNS = [1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0]
PINNED_UNIFORMS = [0.7659810894459607, 0.7207296878877469, 0.35826696037154704]
PINNED_NORMALS = [1.1118094409496433, 0.3312108943306418, 0.2883469816280572]
PINNED_ORDER = [2, 0, 3, 4, 1, 5]
SIGMAS = 5  # of the sampling error of each statistic; the draws are fixed, so this never flakes


def test_the_numbers_are_pinned() -> None:
    key = Key("pinned", 7)
    assert signs(key, 8).tolist() == PINNED_SIGNS
    assert uniforms(key, 3).tolist() == PINNED_UNIFORMS
    assert normals(key, 3).tolist() == PINNED_NORMALS
    assert permutation(key, 6).tolist() == PINNED_ORDER


@pytest.mark.parametrize("draw", [signs, uniforms, normals])
def test_a_longer_draw_extends_a_shorter_one(draw) -> None:
    key = Key("prefix", 0)
    assert torch.equal(draw(key, 5000)[:37], draw(key, 37))
    assert len(draw(key, 0)) == 0


@pytest.mark.parametrize("draw", [signs, uniforms, normals, permutation])
def test_names_and_seeds_separate_streams(draw) -> None:
    streams = [draw(Key(name, seed), 64) for name in ("a", "b") for seed in (0, 1, -1)]
    for i, left in enumerate(streams):
        assert all(not torch.equal(left, right) for right in streams[:i])


def test_moments() -> None:
    n, key = 200_000, Key("moments", 0)
    error = SIGMAS / math.sqrt(n)
    s, u, z = signs(key, n), uniforms(key, n), normals(key, n)
    assert abs(s.mean()) <= error
    assert abs(u.mean() - 0.5) <= error
    assert abs(u.var() - 1 / 12) <= error
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(z.mean()) <= error
    assert abs(z.pow(2).mean() - 1) <= error * math.sqrt(2)
    assert abs(z.pow(4).mean() - 3) <= error * math.sqrt(96)
    assert abs((z[::2] * z[1::2]).mean()) <= error * math.sqrt(2)
    assert abs((s * z).mean()) <= error


def test_a_permutation_has_every_number_once() -> None:
    assert sorted(permutation(Key("a", 0), 100).tolist()) == list(range(100))


def test_the_logarithm_is_right_to_rounding() -> None:
    x = np.concatenate([np.geomspace(1e-300, 1.0, 2001), 1 - np.geomspace(1e-16, 0.5, 101)])
    np.testing.assert_allclose(_log(x), np.log(x), rtol=1e-15, atol=1e-18)
