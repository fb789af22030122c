"""An invertible change of basis with a fast form, given by the numbers of its factor."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, cast, final

import torch
from torch import Tensor

from qpass.errors import BadInput, expect, expect_type
from qpass.rotations.apply import apply, dense
from qpass.rotations.base import Fast, Key
from qpass.rotations.counter import signs

# digits that a worse conditioned factor loses are missed in the 16-bit types of models
CONDITION_LIMIT = 1e3


@final
@dataclass(frozen=True, slots=True)
class Kronecker:
    """`x -> ((x * signs) in blocks) @ (factor (x) H)`: as a fast rotation, with a free factor.

    The invertible factor is `[order, order]`, H the orthonormal Sylvester matrix of order `power`,
    and signs are drawn by `seed`. Equal digests, equal maps; without numbers it is only a name.
    """

    width: int
    order: int
    power: int
    seed: int
    digest: str
    numbers: Tensor | None = field(default=None, compare=False, repr=False)

    # as other changes of basis have them
    heads: ClassVar[int] = 1
    lifted: ClassVar[bool] = False

    @staticmethod
    def of(factor: Tensor, width: int, *, power: int = 1, seed: int = 0) -> Kronecker:
        """The map of a width with this factor; BadInput for one that cannot be undone."""
        if factor.dim() != 2 or factor.shape[0] != factor.shape[1] or factor.numel() == 0:
            raise BadInput(f"a factor is a square matrix, not of shape {list(factor.shape)}")
        own = factor.detach().to("cpu", torch.float64, copy=True).contiguous()
        _check_sizes(width, len(own), power)
        condition = float(torch.linalg.cond(own)) if bool(own.isfinite().all()) else float("nan")
        if not condition <= CONDITION_LIMIT:
            raise BadInput(
                f"the factor has condition {condition:.1e} (limit {CONDITION_LIMIT:.0e}): "
                "it cannot be undone exactly enough"
            )
        content = f"kronecker/{width}/{power}/{seed}/".encode() + own.numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()
        return Kronecker(width, len(own), power, seed, digest, own)

    @staticmethod
    def read(table: Mapping[str, object]) -> Kronecker:
        """The name that `table` wrote; the numbers are given with `filled`."""
        expect(
            set(table) == _KEYS, "transform", dict(table), f"a table of {', '.join(sorted(_KEYS))}"
        )
        for key in ("width", "order", "power", "seed"):
            least = 0 if key == "seed" else 1
            number = type(table[key]) is int and cast("int", table[key]) >= least
            expect(number, key, table[key], f"an integer from {least}")
        width, order, power, seed = (
            cast("int", table[key]) for key in ("width", "order", "power", "seed")
        )
        _check_sizes(width, order, power)
        digest = table["digest"]
        expect_type(str, "digest", digest, "a sha256, hexadecimal")
        expect(len(cast("str", digest)) == 64, "digest", digest, "a sha256, hexadecimal")
        return Kronecker(width, order, power, seed, str(digest))

    def table(self) -> dict[str, object]:
        """The name as JSON values."""
        return {
            "width": self.width,
            "order": self.order,
            "power": self.power,
            "seed": self.seed,
            "digest": self.digest,
        }

    def filled(self, numbers: Tensor) -> Kronecker:
        """The same with its numbers; BadInput for those of another map."""
        given = Kronecker.of(numbers, self.width, power=self.power, seed=self.seed)
        if given != self:
            raise BadInput(f"the numbers of transform {self.digest[:12]} have been altered")
        return given

    @property
    def rotation(self) -> str:
        """What it is called in reports."""
        return f"kronecker {self.digest[:12]}"

    def given(self) -> Tensor:
        """The factor; BadInput for a map that is only a name."""
        if self.numbers is None:
            raise BadInput(
                f"the numbers of the transform {self.digest[:12]} are not here\n"
                "  load the plan from its file, which has them beside it"
            )
        return self.numbers

    def fast(self) -> Fast:
        """The map as a fast transform in float64."""
        return Fast(self._signs(), self.given(), self.power)

    def matrix(self) -> Tensor:
        """`[1, width, width]` in float64."""
        return dense(self.fast()).unsqueeze(0)

    def turn(self, x_rhn: Tensor, *, inverse: bool = False, power: int | Fraction = 1) -> Tensor:
        """`x @ T` on the last axis, or `x @ T^-1` if `inverse`, in float64.

        With a power of -1 T is replaced by its inverse transpose.
        """
        drawn, factor = self._signs(), self.given()
        # T = S (F (x) H) with S and H their own inverses, so T^-T = S (F^-T (x) H)
        if power == -1:
            factor = torch.linalg.inv(factor).mT
        if not inverse:
            return apply(Fast(drawn, factor, self.power), x_rhn)
        undone = Fast(torch.ones_like(drawn), torch.linalg.inv(factor), self.power)
        return apply(undone, x_rhn) * drawn

    def _signs(self) -> Tensor:
        return signs(Key(f"kronecker/{self.width}", self.seed), self.width)


_KEYS = {"width", "order", "power", "seed", "digest"}


def _check_sizes(width: int, order: int, power: int) -> None:
    if power < 1 or power & (power - 1):
        raise BadInput(f"the order of a Sylvester matrix is a power of two, got {power}")
    if order < 2:
        raise BadInput("a factor of one number mixes nothing; give one of order 2 or more")
    if width < 1 or width % (order * power):
        raise BadInput(
            f"width {width} is no multiple of the block {order} x {power}; "
            "choose a factor and a power whose product divides the width"
        )
