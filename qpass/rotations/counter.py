"""Which random numbers a key stands for: the same ones on every machine and in every version.

The bits are Philox (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), whose raw
stream NumPy keeps stable, and all that follows uses only operations that IEEE 754 rounds
correctly. There is no global seed.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qpass.rotations.base import Key

Floats = npt.NDArray[np.float64]

# the atanh series below is cut where its next term is under half a unit in the last place
_LOG_TERMS = 11


def signs(key: Key, n: int) -> Tensor:
    """`[n]` of +1 and -1, equally likely, in float64."""
    return torch.from_numpy(1.0 - 2.0 * (_bits(key, "signs").random_raw(n) >> 63))


def uniforms(key: Key, n: int) -> Tensor:
    """`[n]` multiples of 2**-53 in [0, 1), in float64."""
    return torch.from_numpy(_unit(_bits(key, "uniforms"), n))


def normals(key: Key, n: int) -> Tensor:
    """`[n]` standard normals in float64 (Marsaglia and Bray, A convenient method, 1964)."""
    bits = _bits(key, "normals")
    found = np.empty(0)
    while len(found) < n:
        # the size of a draw must not depend on n, or a longer request would not extend a shorter
        pairs = 2.0 * _unit(bits, 2048).reshape(-1, 2) - 1.0
        square = pairs[:, 0] * pairs[:, 0] + pairs[:, 1] * pairs[:, 1]
        inside = (square > 0.0) & (square < 1.0)
        pairs, square = pairs[inside], square[inside]
        spread = np.sqrt(-2.0 * _log(square) / square)
        found = np.concatenate([found, (pairs * spread[:, None]).reshape(-1)])
    return torch.from_numpy(found[:n].copy())


def permutation(key: Key, n: int) -> Tensor:
    """`[n]` of the numbers 0 to n - 1 in random order."""
    return torch.from_numpy(np.argsort(_bits(key, "order").random_raw(n), kind="stable"))


def _bits(key: Key, use: str) -> np.random.Philox:
    # one stream for each use: signs and normals of one key are independent
    text = f"{use}\0{key.name}\0{key.seed}".encode()
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def _unit(bits: np.random.Philox, n: int) -> Floats:
    return (bits.random_raw(n) >> 11).astype(np.float64) * 2.0**-53


def _log(x: Floats) -> Floats:
    """The natural logarithm by correctly rounded operations: `log` differs between libraries."""
    fraction, exponent = np.frexp(x)
    low = fraction < math.sqrt(0.5)
    fraction, exponent = fraction * (1.0 + low), exponent - low
    z: Floats = (fraction - 1.0) / (fraction + 1.0)
    square, series = z * z, np.zeros_like(z)
    for k in reversed(range(_LOG_TERMS)):
        series = series * square + 1.0 / (2 * k + 1)
    return exponent * math.log(2.0) + 2.0 * z * series
