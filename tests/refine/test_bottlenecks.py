"""Are blocks what lies between the values that all data passes?"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from qpass.analyze import find_heads, find_matmuls
from qpass.calibrate.stream import run_part
from qpass.capture import capture
from qpass.ir import Program, read
from qpass.refine.bottlenecks import Block, find_blocks
from tests.captured import folded

# products in each block, attention and feed-forward apart, then joined
FOUND = {
    "llama": ([4, 3, 4, 3], [7, 7]),
    "gemma3": ([4, 3, 4, 3], [7, 7]),
    "gpt2": ([2, 2, 2, 2], [4, 4]),
    "phi3": ([2, 2, 2, 2], [4, 4]),
    # sizes differ most before the last product
    "bert": ([4, 2, 4, 2, 1], [6, 4, 3]),
    # parts of one size stay apart
    "vision": ([4, 2, 4, 2], [4, 2, 4, 2]),
    "nano_gpt": ([2, 2, 2, 2], [4, 4]),
    # both halves of a layer read one value
    "gpt_neox": ([4, 4], [4, 4]),
}


def sizes_of(program: Program) -> dict[str, int]:
    """Entries of every product's weight, heads apart."""
    matmuls = find_matmuls(program)
    heads = find_heads(program, matmuls)
    return {
        m.node: torch.Size(read.shape(program.node(m.use))).numel()
        for m in matmuls
        if m.node not in heads
    }


def replayed(program: Program, block: Block, values: Mapping[str, object]) -> dict[str, object]:
    """The ends of a block, from what is alive before it."""
    env = {node: values[node.name] for node in block.alive}

    def weight(of: object) -> Tensor | None:
        return None if program.weight(of) is None else program.value(of)

    run_part(block.nodes, env, weight, {}, {})
    return {end.name: env[end] for end in block.ends}


@pytest.mark.parametrize("name", FOUND)
def test_blocks_are_the_halves_of_layers_and_whole_layers(name: str) -> None:
    program, inputs = folded(name).folded, folded(name).inputs
    sizes = sizes_of(program)
    values: dict[str, object] = dict(zip((n.name for n in program.inputs), inputs, strict=True))
    program.run(*inputs, watch=lambda node, value: values.update({node.name: value}))
    for joined, want in zip((False, True), FOUND[name], strict=True):
        blocks = find_blocks(program, sizes, joined=joined)
        assert [len(block.products) for block in blocks] == want
        assert sorted(p for block in blocks for p in block.products) == sorted(sizes)
        for block in blocks:
            for end, value in replayed(program, block, values).items():
                assert torch.equal(value, values[end])


class Translator(nn.Module):
    """An encoder whose result every layer of a decoder reads."""

    def __init__(self, width: int = 12, layers: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.there = nn.ModuleList(Half(width) for _ in range(layers))
        self.back = nn.ModuleList(Half(width) for _ in range(layers))
        self.across = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 20)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.table(source)
        for layer in self.there:
            x = layer(x)
        y = self.table(target)
        for layer, across in zip(self.back, self.across, strict=True):
            y = layer(y)
            y = y + across(x).mean(1, keepdim=True)
        return self.head(y)


class Half(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def test_what_many_blocks_read_ends_none_of_them() -> None:
    ids = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0))
    program = capture(Translator(), (ids, ids)).program
    blocks = find_blocks(program, sizes_of(program), joined=False)
    assert [len(block.products) for block in blocks] == [2] * 3 + [2, 1] * 3


def test_a_program_that_writes_to_values_has_no_blocks() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y[:, 0] = 0
            return y

    program = capture(Writes(), torch.randn(3, 4)).program
    matmuls = find_matmuls(program)
    assert matmuls
    written = any(read.writes(node) for node in program.graph.nodes)
    assert bool(find_blocks(program, {m.node: 1 for m in matmuls})) is not written
