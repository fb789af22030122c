"""Which elements of a finite field are squares: what Paley's matrices are made of."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from qpass.errors import BadInput


@functools.cache
def prime_power(q: int) -> tuple[int, int] | None:
    """The prime p and exponent k with `q == p**k`, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        k, rest = k + 1, rest // p
    return (p, k) if rest == 1 else None


def jacobsthal(q: int) -> Tensor:
    """`Q[a, b] = chi(a - b)` over the field of odd order q, in int8.

    chi is 0 at zero, 1 at other squares and -1 elsewhere, so `Q Q.T == q I - J` and
    `Q J == 0`; Q is symmetric where q is 1 modulo 4 and skew where it is 3.
    """
    base = prime_power(q)
    if base is None or base[0] == 2:
        raise BadInput(f"no finite field has odd order {q}; its order is a power of an odd prime")
    p, k = base
    character = torch.full((q,), -1, dtype=torch.int8)
    character[_powers(p, k)[::2]] = 1
    character[0] = 0
    elements = torch.arange(q)
    difference = torch.zeros(q, q, dtype=torch.int64)
    for place in range(k):
        digit = elements // p**place % p
        difference += (digit[:, None] - digit[None, :]) % p * p**place
    return character[difference]


def _powers(p: int, k: int) -> list[int]:
    """Powers 0 to p**k - 2 of a generator of the field; the digits of an element are base p."""
    tails = itertools.product(range(p), repeat=k)
    return next(powers for tail in tails if (powers := _cycle(p, tail)) is not None)


def _cycle(p: int, tail: tuple[int, ...]) -> list[int] | None:
    """Powers of x modulo `x**k - tail`, or None unless they are all the nonzero elements."""
    k = len(tail)
    element = (1, *(0 for _ in range(k - 1)))
    one, powers = element, list[int]()
    for _ in range(p**k - 1):
        powers.append(sum(digit * p**place for place, digit in enumerate(element)))
        top = element[-1]
        element = tuple(
            (below + top * add) % p for below, add in zip((0, *element[:-1]), tail, strict=True)
        )
        if element == one:
            break
    return powers if len(powers) == p**k - 1 and element == one else None
