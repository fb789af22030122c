"""Invertible transforms in front of products, learned so that both sides round with least error.

Sun et al., FlatQuant: Flatness Matters for LLM Quantization, 2024: `x T` is read and `W T^-T`
stored, with T a Kronecker product of small matrices. As there, the inverse is taken of the matrix
itself, learning is by Adam with a falling rate, product by product, and products of one value share
T. One of the two factors is free here, the other a Hadamard matrix: that is what the operators
multiply by, with one product of the order of the factor for each value. Channel scales are those of
other methods, which fold them; thresholds are found by the roundings.
"""

# m sampled rows, n output channels, k input channels; o order of the factor, p of the rest

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.analyze import Matmul, find_matmuls
from qpass.errors import BadInput
from qpass.ir import Note, Program
from qpass.ops import as_read
from qpass.plan import Online, Plan, Quantized
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.rotations import Kronecker, Transform
from qpass.rotations.hadamard_orders import sylvester
from qpass.rounding import ROUNDINGS, without_data
from qpass.search.fake import best_clip, fake
from qpass.search.holdout import Holdout, split
from qpass.search.products import sample
from qpass.transform import carry_out

# steps of learning, the first of which moves each entry by about this much, against entries of 1
STEPS, RATE = 80, 0.02
# how often a factor is compared on the way: some steps have led to where little can be undone
LOOKS = 2
STEP_ROWS, STEP_CHANNELS = 128, 192
# what candidates are compared on
HELD_ROWS, HELD_CHANNELS = 256, 512
# of the sampled rows
HELD = 0.25
# a factor is multiplied by as it is, so beyond this order it costs more than the product it helps
LARGEST_ORDER = 256
# what a transform has to gain to be worth it: less is noise of the samples
GAIN = 0.98


@final
@dataclass(frozen=True, slots=True)
class Flat(Chooser):
    """Puts a learned invertible transform in front of products, where that lowers errors."""

    name: str = "flat"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        if not task.plan.quantized:
            return task.plan, (Note(False, self.name, "nothing is rounded"),)
        groups = _groups(task)
        online = {o.site: o for o in task.plan.online}
        chosen = 0
        for at, group in enumerate(groups):
            task.advance("learn transforms", at, len(groups))
            transform = group.learned(task.plan.recipe.seed)
            if transform is not None:
                online |= {site: Online(site, transform) for site in group.sites}
                chosen += 1
        task.advance("learn transforms", len(groups), len(groups))
        plan = replace(task.plan, online=tuple(online.values()))
        return Holdout(task).better(plan, self.name, f"{chosen} inputs of {len(groups)} flattened")


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Product:
    """A quantized product with samples of its input, as it is without a transform of its own."""

    entry: Quantized
    x_mk: Tensor
    cost_m: Tensor
    w_nk: Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Form:
    """The sizes of a transform and the factor that learning starts from."""

    order: int
    power: int
    start: Tensor


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Products that read one value, or are one layer, and so have one transform."""

    sites: tuple[str, ...]
    products: tuple[_Product, ...]
    present: Transform | Kronecker | None

    def learned(self, seed: int) -> Kronecker | None:
        """The transform that costs least, if any costs less than what the group has."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        held = [_held(p, generator) for p in self.products]
        least, best = GAIN * self._cost(held, self.present), None
        for form in self._forms(seed):
            for factor in self._factors(form, held, seed, generator):
                width = self.products[0].x_mk.shape[1]
                try:
                    found = Kronecker.of(factor, width, power=form.power, seed=seed)
                except BadInput:
                    # it has come too close to one that cannot be undone
                    continue
                if (cost := self._cost(held, found)) < least:
                    least, best = cost, found
        return best

    def _forms(self, seed: int) -> Iterator[_Form]:
        width = self.products[0].x_mk.shape[1]
        blocks = {
            spec.block
            for p in self.products
            for spec in (p.entry.weight, p.entry.activation)
            if spec is not None and not isinstance(spec.block, str)
        }
        if not blocks:
            if (order := whole_order(width)) is not None:
                start = Transform("hadamard", order, seed).matrix()[0]
                yield _Form(order, width // order, start)
            return
        # scales of their own keep blocks apart: what mixes them mixes what differs
        block = math.gcd(width, *blocks)
        if 1 < block <= LARGEST_ORDER:
            yield _Form(block, 1, torch.eye(block, dtype=torch.float64))
            yield _Form(block, 1, Transform("hadamard", block, seed).matrix()[0])

    def _factors(
        self, form: _Form, held: Sequence[Tensor], seed: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """The start of a form and where Adam goes from it, on rows that are not held out."""
        yield form.start
        width = self.products[0].x_mk.shape[1]
        drawn = Kronecker.of(form.start, width, power=form.power, seed=seed).fast().signs.float()
        start = form.start.float()
        # entries of the change are of one size, whatever those of the start
        change = torch.zeros(form.order, form.order, requires_grad=True)
        clips = [_clip(p, drawn, start, form.power) for p in self.products]
        rows = [_Rows.of(p, some) for p, some in zip(self.products, held, strict=True)]
        optimizer = torch.optim.Adam([change], lr=RATE, betas=(0.9, 0.95))
        eye = torch.eye(form.order)
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            factor = start @ (eye + change)
            losses = [
                _loss(p, r, c, drawn, factor, form.power, generator)
                for p, r, c in zip(self.products, rows, clips, strict=True)
            ]
            (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), [change])
            if not bool(gradient.isfinite().all()):
                return
            change.grad = gradient
            optimizer.step()
            if (step + 1) % (STEPS // LOOKS) == 0:
                yield (start @ (eye + change)).detach().double()

    def _cost(self, held: Sequence[Tensor], transform: Transform | Kronecker | None) -> float:
        """What errors of the held rows cost under a transform."""
        total = 0.0
        for product, at_m in zip(self.products, held, strict=True):
            x_mk = product.x_mk[at_m]
            w_nk = product.w_nk[:: -(-len(product.w_nk) // HELD_CHANNELS)]
            want_mn = x_mk @ w_nk.mT
            if transform is not None:
                x_mk, w_nk = _applied(transform, x_mk, 1), _applied(transform, w_nk, -1)
            got_mn = _read(product.entry, x_mk) @ _stored(product.entry, w_nk).mT
            error_m = (got_mn - want_mn).square().mean(1)
            total += float((error_m * product.cost_m[at_m]).mean()) * len(product.w_nk)
        return total


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows that are learned from, and how often each is drawn.

    Half at random, half by what errors cost: a few rows cost more than all others together.
    """

    at_m: Tensor
    odds_m: Tensor

    @staticmethod
    def of(product: _Product, held: Tensor) -> _Rows:
        free = torch.ones(len(product.x_mk), dtype=torch.bool)
        free[held] = False
        at_m = free.nonzero().squeeze(1) if bool(free.any()) else held
        share_m = product.cost_m[at_m] * product.x_mk[at_m].square().sum(1)
        share_m = share_m / share_m.sum().clamp_min(1e-30)
        return _Rows(at_m, 0.5 * share_m + 0.5 / len(at_m))


def whole_order(width: int) -> int | None:
    """The order of the factor of a width: about its root, with a power of two as the rest."""
    order = width // (width & -width)
    while order * order < width:
        order *= 2
    return order if 1 < order <= LARGEST_ORDER else None


def _groups(task: Task) -> list[_Group]:
    """The quantized products, those of one value or one layer together."""
    plan = task.plan
    entries = {entry.site: entry for entry in plan.quantized}
    present = {o.site: o.transform for o in plan.online}
    bare = replace(plan, online=tuple(o for o in plan.online if o.site not in entries))
    after = carry_out(task.program, task.folded, bare).program
    matmuls = [m for m in find_matmuls(after) if after.site(m.use) in entries]
    weights = {m.use: after.weights[m.use].evaluate(after.sources).float() for m in matmuls}
    learning, _ = split(task.batches)
    rows = sample(task.program, after, matmuls, learning, weights, plan.recipe.seed)
    found: list[_Group] = []
    for together in _together(after, [m for m in matmuls if m.use in rows]):
        sites = tuple(dict.fromkeys(after.site(m.use) for m in together))
        held = {present.get(site) for site in sites}
        if len(held) > 1 or len({rows[m.use][0].shape[1] for m in together}) > 1:
            continue
        products = tuple(
            _Product(
                entries[after.site(m.use)],
                *rows[m.use],
                weights[m.use] if m.reads == 1 else weights[m.use].mT,
            )
            for m in together
        )
        found.append(_Group(sites, products, held.pop()))
    return found


def _together(after: Program, matmuls: Sequence[Matmul]) -> list[list[Matmul]]:
    """Products that share a value or a layer."""
    first: dict[str, int] = {}
    one = list(range(len(matmuls)))
    for i, matmul in enumerate(matmuls):
        for key in (f"value {matmul.value}", f"site {after.site(matmul.use)}"):
            other, mine = one[first.setdefault(key, i)], one[i]
            one = [other if at == mine else at for at in one]
    return [
        [m for m, at in zip(matmuls, one, strict=True) if at == each] for each in dict.fromkeys(one)
    ]


def _held(product: _Product, generator: torch.Generator) -> Tensor:
    count = len(product.x_mk)
    most = min(HELD_ROWS, max(1, round(HELD * count)))
    return torch.randperm(count, generator=generator)[:most]


def _clip(product: _Product, signs: Tensor, factor: Tensor, power: int) -> float:
    some_nk = product.w_nk[:: -(-len(product.w_nk) // STEP_CHANNELS)]
    return best_clip(
        _turned(some_nk, signs, torch.linalg.inv(factor).mT, power), product.entry.weight
    )


def _loss(
    product: _Product,
    rows: _Rows,
    clip: float,
    signs: Tensor,
    factor: Tensor,
    power: int,
    generator: torch.Generator,
) -> Tensor:
    """What the errors of a product cost, on fresh rows and channels."""
    drawn = torch.multinomial(rows.odds_m, STEP_ROWS, replacement=True, generator=generator)
    at_m = rows.at_m[drawn]
    n = len(product.w_nk)
    at_n = torch.randperm(n, generator=generator)[:STEP_CHANNELS]
    x_mk, w_nk = product.x_mk[at_m], product.w_nk[at_n]
    want_mn = x_mk @ w_nk.mT
    read_mk = _turned(x_mk, signs, factor, power)
    stored_nk = _turned(w_nk, signs, torch.linalg.inv(factor).mT, power)
    if product.entry.activation is not None:
        read_mk = fake(read_mk, product.entry.activation)
    got_mn = read_mk @ fake(stored_nk, product.entry.weight, clip).mT
    # what is drawn often counts less
    weight_m = product.cost_m[at_m] / (len(rows.at_m) * rows.odds_m[drawn])
    return n * ((got_mn - want_mn).square().mean(1) * weight_m).mean()


def _read(entry: Quantized, x_mk: Tensor) -> Tensor:
    return x_mk if entry.activation is None else as_read(x_mk, entry.activation)


def _stored(entry: Quantized, w_nk: Tensor) -> Tensor:
    # a rounding that wants data is judged by what needs none
    method = ROUNDINGS[without_data(entry.rounding)]
    return method.round(w_nk.contiguous(), entry.weight, {}).dequantize(torch.float32)


def _turned(x: Tensor, signs: Tensor, factor: Tensor, power: int) -> Tensor:
    """As the operator has it, with a gradient for the factor."""
    y = (x * signs).reshape(-1, len(factor), power)
    return (factor.mT @ (y @ _sylvester(power))).reshape(x.shape)


@functools.cache
def _sylvester(power: int) -> Tensor:
    return sylvester(power).float() * power**-0.5


def _applied(transform: Transform | Kronecker, x: Tensor, power: int) -> Tensor:
    return transform.turn(x.unsqueeze(-2), power=power).squeeze(-2)


CHOOSERS.add(Flat())
