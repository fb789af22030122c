"""A basis change by its numbers: what cannot be named is given, and told apart by its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import cast, final

import torch
from torch import Tensor

from qpass.errors import BadInput, expect, expect_type
from qpass.rotations.group import Group

# how far a float64 product of an orthogonal matrix with its transpose may be from the identity
ORTHOGONAL_LIMIT = 1e-10
# a worse conditioned matrix loses more digits than the float64 check of a rewrite allows
CONDITION_LIMIT = 1e5

ORTHOGONAL, DIAGONAL, PERMUTATION, GENERAL = KINDS = (
    "orthogonal",
    "diagonal",
    "permutation",
    "general",
)


@final
@dataclass(frozen=True, slots=True)
class Element:
    """One change of basis of a width, or `heads` different ones; equal digests, equal changes.

    `lifted` says that each matrix fixes the all-ones vector. The numbers are matrices `[heads,
    width, width]`, for a diagonal its entries and for a permutation the old place of each new
    coordinate, `[heads, width]`; they are shared and never written to. Without them an element is
    only a name, which can be compared and not carried out.
    """

    kind: str
    width: int
    heads: int
    digest: str
    lifted: bool = False
    numbers: Tensor | None = field(default=None, compare=False, repr=False)

    @staticmethod
    def of(kind: str, numbers: Tensor, *, lifted: bool = False) -> Element:
        """The element with these numbers; the axis of heads may be left out.

        Raises BadInput for numbers that are none of the kind: a matrix that is not orthogonal to
        `ORTHOGONAL_LIMIT`, a scale of zero, places that are no permutation.
        """
        if kind not in KINDS:
            raise BadInput(f"kind = {kind!r}: expected {' or '.join(KINDS)}")
        dims = 3 if kind in (ORTHOGONAL, GENERAL) else 2
        if numbers.dim() not in (dims - 1, dims):
            raise BadInput(f"a {kind} element takes a tensor with {dims} axes, heads first")
        dtype = torch.int64 if kind == PERMUTATION else torch.float64
        if numbers.is_complex() or (kind == PERMUTATION and numbers.is_floating_point()):
            raise BadInput(f"a {kind} element takes {dtype}, not {numbers.dtype}")
        own = numbers.detach().to("cpu", dtype, copy=True).contiguous()
        own = own if own.dim() == dims else own.unsqueeze(0)
        heads, width = own.shape[:2]
        if own.numel() == 0 or own.shape[-1] != width:
            raise BadInput(f"a {kind} element cannot have the shape {list(numbers.shape)}")
        if not bool(own.isfinite().all()):
            raise BadInput(f"a {kind} element takes finite numbers")
        _CHECKS[kind](own)
        if lifted and not _fixes_ones(kind, own):
            raise BadInput(f"this {kind} element does not fix the all-ones vector; lift it first")
        return Element(kind, width, heads, _digest(kind, own, lifted), lifted, own)

    @staticmethod
    def read(table: Mapping[str, object]) -> Element:
        """The name that `table` wrote; the numbers are given with `filled`."""
        expect(
            set(table) == _KEYS, "element", dict(table), f"a table of {', '.join(sorted(_KEYS))}"
        )
        kind, digest = table["kind"], table["digest"]
        expect(kind in KINDS, "kind", kind, " or ".join(KINDS))
        width, heads = table["width"], table["heads"]
        for key, size in (("width", width), ("heads", heads)):
            expect(type(size) is int and size >= 1, key, size, "an integer from 1")
        hexadecimal = isinstance(digest, str) and len(digest) == 64
        expect(hexadecimal, "digest", digest, "a sha256, hexadecimal")
        expect_type(bool, "lifted", table["lifted"], "true or false")
        sizes = cast("int", width), cast("int", heads)
        return Element(str(kind), *sizes, str(digest), bool(table["lifted"]))

    def table(self) -> dict[str, object]:
        """The name as JSON values."""
        return {
            "kind": self.kind,
            "width": self.width,
            "heads": self.heads,
            "digest": self.digest,
            "lifted": self.lifted,
        }

    def filled(self, numbers: Tensor) -> Element:
        """The same with its numbers; BadInput for those of another element."""
        given = Element.of(self.kind, numbers, lifted=self.lifted)
        if given != self:
            raise BadInput(f"the numbers of element {self.digest[:12]} have been altered")
        return given

    @property
    def rotation(self) -> str:
        """What it is called in reports."""
        return f"{self.kind} {self.digest[:12]}"

    @property
    def group(self) -> Group:
        """The smallest group that is known to hold it."""
        if self.kind == ORTHOGONAL:
            return Group.ORTHOGONAL_ONES if self.lifted else Group.ORTHOGONAL
        if self.kind != DIAGONAL:
            return Group.PERMUTATION if self.kind == PERMUTATION else Group.GENERAL
        scales = self.given()
        if bool((scales > 0).all()):
            return Group.POSITIVE_DIAGONAL
        return Group.SIGNS if bool((scales.abs() == 1).all()) else Group.DIAGONAL

    def matrix(self) -> Tensor:
        """`[heads, width, width]` in float64."""
        numbers = self.given()
        if self.kind == DIAGONAL:
            return torch.diag_embed(numbers)
        if self.kind == PERMUTATION:
            eye = torch.eye(self.width, dtype=torch.float64, device="cpu")
            return torch.stack([eye[:, at] for at in numbers])
        return numbers

    def turn(self, x_rhn: Tensor, *, inverse: bool = False, power: int | Fraction = 1) -> Tensor:
        """`x @ T` on the last axis for each head's T, or `x @ T^-1` if `inverse`, in float64.

        With a power of -1 T is replaced by its inverse transpose; a diagonal takes any power.
        """
        if self.heads not in (1, x_rhn.shape[-2]):
            raise BadInput(f"{self.heads} heads cannot turn {x_rhn.shape[-2]}")
        numbers = self.given()
        if self.kind == DIAGONAL:
            return x_rhn * numbers ** float(-power if inverse else power)
        if self.kind == PERMUTATION:
            at = numbers.argsort(-1) if inverse else numbers
            return x_rhn.gather(-1, at.expand(x_rhn.shape))
        if self.kind == GENERAL and power == -1:
            # x T^-T, and its inverse x T^T
            matrix = numbers.mT if inverse else torch.linalg.inv(numbers).mT
        elif self.kind == GENERAL and inverse:
            matrix = torch.linalg.inv(numbers)
        else:
            matrix = numbers.mT if inverse else numbers
        if self.heads == 1:
            return x_rhn @ matrix[0]
        return torch.einsum("...hn,hnm->...hm", x_rhn, matrix)

    def given(self) -> Tensor:
        """The numbers; BadInput for an element that is only a name."""
        if self.numbers is None:
            raise BadInput(
                f"the numbers of the {self.kind} element {self.digest[:12]} are not here\n"
                "  load the plan from its file, which has them beside it"
            )
        return self.numbers


_KEYS = {"kind", "width", "heads", "digest", "lifted"}


def _orthogonal(matrix: Tensor) -> None:
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    error = float((matrix @ matrix.mT - eye).abs().max())
    if not error <= ORTHOGONAL_LIMIT:
        raise BadInput(
            f"the matrix is not orthogonal: R R^T is {error:.1e} from the identity "
            f"(limit {ORTHOGONAL_LIMIT:.0e})\n  give its nearest orthogonal matrix, in float64"
        )


def _diagonal(scales: Tensor) -> None:
    if not bool((scales != 0).all()):
        raise BadInput("a scale is zero, which cannot be undone; give scales that are not")
    ratio = float(scales.abs().max() / scales.abs().min())
    if not ratio <= CONDITION_LIMIT**2:
        raise BadInput(f"the scales differ by a factor of {ratio:.1e}; clamp them")


def _permutation(places: Tensor) -> None:
    wanted = torch.arange(places.shape[-1], dtype=torch.int64, device=places.device)
    if not torch.equal(places.sort(-1).values, wanted.expand(places.shape)):
        raise BadInput("the places are no permutation: each must be there once")


def _general(matrix: Tensor) -> None:
    condition = float(torch.linalg.cond(matrix).max())
    if not condition <= CONDITION_LIMIT:
        raise BadInput(
            f"the matrix has condition {condition:.1e} (limit {CONDITION_LIMIT:.0e}): "
            "it cannot be undone exactly enough"
        )


_CHECKS: dict[str, Callable[[Tensor], None]] = {
    ORTHOGONAL: _orthogonal,
    DIAGONAL: _diagonal,
    PERMUTATION: _permutation,
    GENERAL: _general,
}


def _fixes_ones(kind: str, numbers: Tensor) -> bool:
    if kind in (DIAGONAL, PERMUTATION):
        return kind == PERMUTATION
    return bool(((numbers.sum(-2) - 1).abs() <= ORTHOGONAL_LIMIT).all())


def _digest(kind: str, numbers: Tensor, lifted: bool) -> str:
    content = f"{kind}/{lifted}/{list(numbers.shape)}/".encode() + numbers.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()
