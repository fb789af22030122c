"""Rotations within blocks, a permutation that evens the blocks out, and rotations again.

Lin et al., DuQuant: Distributing Outliers via Dual Transformation Makes Stronger Quantized LLMs,
2024. As in the paper, a step moves the coordinate of the largest value to the front of its block,
where a matrix with an even first row spreads it over the block and a random one mixes the rest; of
all steps the one with the smallest range is kept. The permutation deals channels to blocks back and
forth, by size. As in the public code, the blocks of a value share their rotation. What weights
absorb is one orthogonal matrix here; in front of a product the blocks rotate as the model runs,
and a permutation before them is absorbed by what makes the value, where that is free to.
"""

# m sampled values, n width of a region, b width of a block

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qpass.analyze import Region, Role, find_regions
from qpass.ir import Block, Note
from qpass.plan import Changed, Online, Plan
from qpass.plan.chooser import CHOOSERS, Chooser, Task
from qpass.rotations import Element, Group, Kronecker, Transform, lift
from qpass.search.groups import Group as Reading
from qpass.search.groups import groups
from qpass.search.holdout import Holdout
from qpass.search.products import Products, prepare
from qpass.search.regions import Turning, coordinates
from qpass.search.samples import applied, changed_places
from qpass.search.stacks import cheaper

LARGEST_BLOCK = 128
# steps that the rotation of a block may take
STEPS = 64
# values of one product that count
ROWS = 32
# what a transform that runs has to gain to be worth it: less is noise of the samples
GAIN = 0.98


@final
@dataclass(frozen=True, slots=True)
class DuQuant(Chooser):
    """Replaces the rotations of the plan by some that are made for the values, where better."""

    name: str = "duquant"

    def choose(self, task: Task) -> tuple[Plan, tuple[Note, ...]]:
        if not task.plan.quantized:
            return task.plan, (Note(False, self.name, "nothing is rounded"),)
        plan = _folded(task)
        plan, running = _running(replace(task, plan=plan))
        done = f"outliers dealt to blocks and spread, {running} times as the model runs"
        return Holdout(task).better(plan, self.name, done)


def _folded(task: Task) -> Plan:
    """The plan with better matrices for what weights absorb."""
    prepared = prepare(task)
    if isinstance(prepared, str):
        return task.plan
    trial, products = prepared
    turning, seed = trial.turning, task.plan.recipe.seed
    found = _further(products, turning, seed)
    chosen = cheaper(products, turning.shapes, found, seed)
    return task.plan if chosen is None else turning.plan(task.plan, chosen)


def _running(task: Task) -> tuple[Plan, int]:
    """The plan with better transforms in front of products, and how many there are."""
    seed = task.plan.recipe.seed
    after, every = groups(task)
    regions = find_regions(after, Group.PERMUTATION)
    online = {o.site: o for o in task.plan.online}
    taken = changed_places(after, task.plan.changed)
    changed: list[Changed] = []
    count = 0
    for at, group in enumerate(every):
        task.advance("deal outliers", at, len(every))
        block = block_of(group.width)
        # what does not run yet costs more than a better matrix is worth
        if group.present is None or block is None:
            continue
        generator = torch.Generator(device="cpu").manual_seed(seed)
        held = [p.held(generator) for p in group.products]
        values_mn = torch.cat([_some(p.x_mk) for p in group.products])
        least, best = GAIN * group.cost(held, group.present), None
        region = _permutes(regions, group)
        orders: list[Tensor | None] = [None]
        if region is not None and taken.isdisjoint((s.use, s.axis) for s in region.sites):
            orders.append(zigzag(values_mn.abs().amax(0), block))
        for places in orders:
            transform = _blocks(values_mn if places is None else values_mn[:, places], block, seed)
            if (cost := group.cost(held, transform, places)) < least:
                least, best = cost, (transform, places)
        if best is None:
            continue
        transform, places = best
        count += 1
        online |= {site: Online(site, transform) for site in group.sites}
        if region is not None and places is not None:
            element = Element.of("permutation", places)
            changed.append(Changed(region.name, region.group, element))
    task.advance("deal outliers", len(every), len(every))
    plan = replace(task.plan, online=tuple(online.values()), changed=(*task.plan.changed, *changed))
    return plan, count


def _permutes(regions: Sequence[Region], group: Reading) -> Region | None:
    """The free region that is all that a group of products reads, and nothing else does."""
    uses = {p.matmul.use: p.matmul.reads for p in group.products}
    for region in regions:
        readers = [s for s in region.sites if s.role is Role.READS]
        whole = all(
            uses.get(s.use) == s.axis and s.block == Block.whole(group.width) for s in readers
        )
        if region.free and region.heads == 1 and whole and len(readers) == len(uses):
            return region
    return None


def _blocks(values_mn: Tensor, block: int, seed: int) -> Kronecker:
    """The rotation of every block, as it runs with the model."""
    width = values_mn.shape[1]
    plain = Kronecker.of(torch.eye(block, dtype=torch.float64), width, seed=seed)
    return Kronecker.of(spread(applied(plain, values_mn, 1), block, seed), width, seed=seed)


def _some(x_mk: Tensor) -> Tensor:
    """The rows with the largest values, and some others."""
    largest = x_mk.abs().amax(1).topk(min(ROWS, len(x_mk))).indices
    return torch.cat([x_mk[largest], x_mk[:: -(-len(x_mk) // ROWS)]])


def block_of(width: int) -> int | None:
    """The largest power of two that divides a width, to a limit."""
    block = min(width & -width, LARGEST_BLOCK)
    return block if block > 1 else None


def _further(products: Products, turning: Turning, seed: int) -> list[Tensor]:
    """What takes the values of the start to those of the method, by stack."""
    found: list[Tensor] = []
    for i, ((h, n), lifted) in enumerate(zip(turning.shapes, turning.lifted, strict=True)):
        first = turning.stacks[i][0].transform.matrix()
        first = first.expand(h, n, n)
        block = block_of(n)
        if block is None:
            found.append(torch.eye(n).repeat(h, 1, 1))
            continue
        matrices: list[Tensor] = []
        for head, values_mn in enumerate(_values(products, i, h)):
            plain_mn = values_mn.double() @ first[head].mT
            made = dual(plain_mn, block, seed)
            matrices.append(first[head].mT @ (lift(made) if lifted else made))
        found.append(torch.stack(matrices).float())
    return found


def _values(products: Products, stack: int, heads: int) -> list[Tensor]:
    """The largest and some other values `[m, n]` that products read of a stack, for each head."""
    found: list[list[Tensor]] = [[] for _ in range(heads)]
    for product in products.all:
        for spot in product.reading:
            if spot.stack != stack:
                continue
            rows_mk = _some(product.x_mk)
            # one matrix may serve all heads of a block
            x_mrhn = coordinates(rows_mk, spot.block)
            for head in range(heads):
                some = x_mrhn if heads == 1 else x_mrhn[:, :, head : head + 1]
                found[head].append(some.flatten(0, 2))
    return [torch.cat(some) for some in found]


def dual(values_mn: Tensor, block: int, seed: int) -> Tensor:
    """The orthogonal float64 matrix `[n, n]` of the method for values in blocks."""
    width = values_mn.shape[1]
    first = spread(values_mn, block, seed)
    turned_mn = _in_blocks(values_mn, first)
    places = zigzag(turned_mn.abs().amax(0), block)
    second = spread(turned_mn[:, places], block, seed)
    eye = torch.eye(width, dtype=torch.float64)
    return _in_blocks(_in_blocks(eye, first)[:, places], second)


def spread(values_mn: Tensor, block: int, seed: int) -> Tensor:
    """The orthogonal float64 matrix `[b, b]` that the greedy steps for all blocks lead to."""
    values_mb = values_mn.double().reshape(-1, block)
    step = _step(block, seed)
    made = torch.eye(block, dtype=torch.float64)
    least, best = _range(values_mb), made
    for _ in range(STEPS):
        largest = int(values_mb.abs().amax(0).argmax())
        order = torch.arange(block)
        order[0], order[largest] = largest, 0
        swapped = step[order][:, order]
        values_mb, made = values_mb @ swapped, made @ swapped
        if (reached := _range(values_mb)) < least:
            least, best = reached, made
    return best


def zigzag(sizes_n: Tensor, block: int) -> Tensor:
    """The old place of each new coordinate: the largest dealt to blocks forth and back."""
    blocks = len(sizes_n) // block
    ranked = sizes_n.sort(descending=True, stable=True).indices.reshape(block, blocks)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.mT.reshape(-1)


def _in_blocks(values_mn: Tensor, matrix_bb: Tensor) -> Tensor:
    return (values_mn.reshape(-1, len(matrix_bb)) @ matrix_bb).reshape(values_mn.shape)


def _range(values_mb: Tensor) -> float:
    return float(values_mb.max() - values_mb.min())


def _step(block: int, seed: int) -> Tensor:
    """An orthogonal matrix with an even first row, random beyond its first column."""
    even = torch.full((block,), block**-0.5, dtype=torch.float64)
    v = -even
    v[0] += 1
    # the reflection that takes the first unit vector to the even one
    reflection = torch.eye(block, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)
    mixing = torch.eye(block, dtype=torch.float64)
    mixing[1:, 1:] = Transform("haar", block - 1, seed).matrix()[0]
    return reflection @ mixing


CHOOSERS.add(DuQuant())
