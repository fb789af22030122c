"""Which parts of a program are optimised together: from one bottleneck of its data to the next.

Every way from what is looked up or given to what the program returns passes its bottlenecks: the
values of the residual stream between attention and feed-forward parts, whatever these are made of.
What lies between two of them is a block. Blocks that follow one another may be joined: those whose
sizes differ most, as "Solving Oscillation Problem in Post-Training Quantization Through a
Theoretical Perspective" (2023) asks for, where a small part would be made to absorb the errors of
a large one. The paper joins modules at the largest differences of their capacities, counted without
data from their parameters; here so too, in pairs, so that memory stays bounded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import cast, final

from torch import Tensor, fx

from qpass.analyze import find_tables
from qpass.ir import Program, read
from qpass.plan import Role
from qpass.plan.refiner import Refining
from qpass.refine.pair import Pair


@final
@dataclass(frozen=True, slots=True)
class Block:
    """Nodes of a program in order, the products among them, and where what they make goes on.

    `alive` are the values from before that are read in it, weights apart; `ends` are the
    bottlenecks that it leads to.
    """

    nodes: tuple[fx.Node, ...]
    products: tuple[str, ...]
    alive: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]

    @property
    def first(self) -> fx.Node:
        return self.nodes[0]


def find_blocks(
    program: Program, products: Mapping[str, int], *, joined: bool = True
) -> tuple[Block, ...]:
    """The blocks that hold `products`, nodes by name with their sizes, in the order of the graph.

    A program that writes to values has none, and products that no bottleneck follows are in none.
    """
    nodes = list(program.graph.nodes)
    if not products or any(map(read.writes, nodes)):
        return ()
    at = {node: index for index, node in enumerate(nodes)}
    spans = _spans(program, nodes, at, {program.node(name) for name in products})
    blocks = [_block(program, nodes, span, products) for span in _apart(spans, at)]
    return tuple(_joined(program, nodes, at, blocks, products) if joined else blocks)


def blocks_of(task: Refining, pair: Pair) -> tuple[Block, ...]:
    """The blocks around the quantized products of a model, without heads and shared weights."""
    sizes: dict[str, int] = {}
    read_by = Counter(task.program.site(m.use) for m in pair.products.values())
    for node, matmul in pair.products.items():
        alone = read_by[task.program.site(matmul.use)] == 1
        # what is good for a weight in one place may cost something in another
        if alone and pair.entries[matmul.use].role is Role.LINEAR:
            rows, columns = read.shape(task.program.node(matmul.use))
            sizes[node] = int(rows) * int(columns)
    return find_blocks(task.program, sizes)


Span = tuple[int, int, tuple[fx.Node, ...]]


def _spans(
    program: Program, nodes: list[fx.Node], at: Mapping[fx.Node, int], products: set[fx.Node]
) -> list[Span]:
    """The shortest way between bottlenecks around each product, as places of nodes."""
    outputs = program.outputs
    above = [_above((node,)) for node in outputs]
    if not above:
        return []
    most = max(range(len(outputs)), key=lambda i: len(above[i] & products))
    sink = outputs[most]
    # sizes and masks are no data that a model works on
    inside = {node for node in above[most] if _floating(node)}
    if sink not in inside:
        return []
    after = _post_dominators(nodes, inside, sink)
    found: dict[fx.Node, Span] = {}
    for start in _sources(program, inside):
        while start is not sink:
            end = after[start]
            span = at[start] + 1, at[end] + 1, (end,)
            # what is made of other data meets it here, too: keys and values of another text
            for product in products & _above((end,)):
                known = found.get(product)
                if not span[0] <= at[product] < span[1]:
                    continue
                if known is None or span[1] - span[0] < known[1] - known[0]:
                    found[product] = span
            start = end
    return sorted(set(found.values()), key=lambda span: span[:2])


def _sources(program: Program, inside: Collection[fx.Node]) -> list[fx.Node]:
    """Where data comes in: what is looked up, and given values of floating types."""
    tables = set(find_tables(program))
    looked_up = [
        user for name in sorted(tables) for user in program.node(name).users if user in inside
    ]
    given = [node for node in program.inputs if node in inside]
    return list(dict.fromkeys([*given, *looked_up]))


def _floating(node: fx.Node) -> bool:
    found = node.meta.get("val")
    some = cast("list[object]", found) if isinstance(found, list | tuple) else [found]
    return any(isinstance(f, Tensor) and f.is_floating_point() for f in some)


def _above(ends: Iterable[fx.Node]) -> set[fx.Node]:
    """All that some values are made of, themselves too."""
    found: set[fx.Node] = set()
    left = list(ends)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found


def _post_dominators(
    nodes: list[fx.Node], inside: Collection[fx.Node], sink: fx.Node
) -> dict[fx.Node, fx.Node]:
    """For each node, the next one that every way from it to the sink passes."""
    after: dict[fx.Node, fx.Node] = {sink: sink}
    depth: dict[fx.Node, int] = {sink: 0}
    for node in reversed(nodes):
        if node is sink or node not in inside:
            continue
        meeting: fx.Node | None = None
        for user in node.users:
            if user not in depth:
                continue
            other = user
            while meeting is not None and meeting is not other:
                if depth[meeting] >= depth[other]:
                    meeting = after[meeting]
                else:
                    other = after[other]
            meeting = other
        if meeting is not None:
            after[node], depth[node] = meeting, depth[meeting] + 1
    return after


def _apart(spans: list[Span], at: Mapping[fx.Node, int]) -> list[Span]:
    """Spans that overlap, as one."""
    apart: list[Span] = []
    for start, stop, ends in spans:
        if apart and start < apart[-1][1]:
            first, last, others = apart.pop()
            ends = tuple(sorted({*others, *ends}, key=at.__getitem__))
            start, stop = first, max(last, stop)
        apart.append((start, stop, ends))
    return apart


def _block(program: Program, nodes: list[fx.Node], span: Span, products: Collection[str]) -> Block:
    start, stop, ends = span
    within = nodes[start:stop]
    wanted = _above(ends)
    run = tuple(n for n in within if n in wanted and n.op == "call_function")
    own = set(run)
    alive = dict.fromkeys(
        n
        for node in run
        for n in node.all_input_nodes
        if n not in own and program.weight(n) is None
    )
    names = tuple(n.name for n in run if n.name in products)
    return Block(run, names, tuple(alive), ends)


def _joined(
    program: Program,
    nodes: list[fx.Node],
    at: Mapping[fx.Node, int],
    blocks: list[Block],
    products: Mapping[str, int],
) -> list[Block]:
    """Neighbours of the most different sizes as one, each block in one pair at most."""
    size = [sum(products[name] for name in block.products) for block in blocks]
    follow = [
        i for i in range(len(blocks) - 1) if _above(blocks[i + 1].alive).issuperset(blocks[i].ends)
    ]
    follow.sort(key=lambda i: -abs(size[i] - size[i + 1]))
    taken: dict[int, int] = {}
    for i in follow:
        if size[i] != size[i + 1] and i not in taken and i + 1 not in taken:
            taken[i], taken[i + 1] = i, i
    found: list[Block] = []
    for i, block in enumerate(blocks):
        if taken.get(i - 1) == i - 1 == taken.get(i):
            continue
        if taken.get(i) == i:
            after = blocks[i + 1]
            span = at[block.first], max(map(at.__getitem__, after.nodes)) + 1, after.ends
            block = _block(program, nodes, span, products)
        found.append(block)
    return found
