"""Has each architecture the regions that it should, under every group, and none that is larger?"""

from __future__ import annotations

import functools
import re

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional

from qpass.analyze import Region, find_regions, largest_regions
from qpass.capture import capture
from qpass.ir import Program, run_passes
from qpass.rotations import Group
from qpass.rotations.elements import contains
from qpass.transform import FoldNorms
from tests import captured
from tests.analyze.changes import matrices
from tests.analyze.regions import PLANES, change, changes_output, copied, differs, fits
from tests.zoo import _GATED, ZOO, randomise, tiny, tokens

WIDTH = 12


class Inner(nn.Module):
    """What stands between two linear layers of a residual block."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.first, self.last = nn.Linear(WIDTH, inner, bias=False), nn.Linear(inner, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(x + self.last(self.between(y)))


class SquaredRelu(Inner):
    def __init__(self) -> None:
        super().__init__(10)

    def between(self, x: Tensor) -> Tensor:
        return functional.relu(self.first(x)).square()


class Bilinear(Inner):
    def __init__(self) -> None:
        super().__init__(10)
        self.gate = nn.Linear(WIDTH, 10, bias=False)

    def between(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.first(x)


class ScaledHeads(Inner):
    """The values of heads that are weighed by gates of their own."""

    def __init__(self) -> None:
        super().__init__(12)
        self.gate = nn.Linear(WIDTH, 3)

    def between(self, x: Tensor) -> Tensor:
        y = self.first(x).unflatten(-1, (3, 4))
        return (y * self.gate(x).sigmoid().unsqueeze(-1)).flatten(-2)


class Blocks(ScaledHeads):
    """Heads in blocks of four rows, of which nobody knows how many there are."""

    def between(self, x: Tensor) -> Tensor:
        more = -x.shape[1] % 4
        blocks = x.shape[0] * ((x.shape[1] + more) // 4)
        y = self.first(functional.pad(x, (0, 0, 0, more))).reshape(blocks, 4, 3, 4)
        y = torch.ones(4, 4, dtype=x.dtype).tril() @ y.transpose(1, 2)
        y = y.transpose(1, 2).reshape(x.shape[0], -1, 12)[:, : x.shape[1]].unflatten(-1, (3, 4))
        return (y * self.gate(x).sigmoid().unsqueeze(-1)).flatten(-2)


class Mixture(nn.Module):
    """All experts at once, weighed by a router: no row is sent to an expert by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up, self.down = (nn.Parameter(torch.ones(4, *s)) for s in ((WIDTH, 6), (6, WIDTH)))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.einsum("btd,edi->btei", x, self.up)
        made = torch.einsum("btei,eid->bted", functional.gelu(inner), self.down)
        return self.head((self.router(x).softmax(-1).unsqueeze(-1) * made).sum(-2))


CUSTOM: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (SquaredRelu, Bilinear, ScaledHeads, Blocks, Mixture)
}
NAMES = [*(entry.name for entry in ZOO), "mixtral", *CUSTOM]


@functools.cache
def program(name: str) -> tuple[Program, tuple[object, ...], Tensor]:
    """A folded program, its flat inputs and its float64 output."""
    if name in (entry.name for entry in ZOO):
        found = captured.folded(name)
        return found.folded, found.inputs, found.output
    model, x = sent_to_experts() if name == "mixtral" else custom(name)
    made = capture(model.eval(), x)
    folded, _ = run_passes(made.program, [FoldNorms()])
    flat = made.flatten(x)
    want = made.program.run(*flat, widen=True)[0]
    assert isinstance(want, Tensor)
    return folded, flat, want


def custom(name: str) -> tuple[nn.Module, Tensor]:
    model = CUSTOM[name]().double()
    randomise(model, 0)
    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=generator)


def sent_to_experts() -> tuple[nn.Module, Tensor]:
    """Experts in one weight, whose rows are sorted by expert; the operator takes no float64."""
    config = hf.MixtralConfig(**_GATED, num_local_experts=4, num_experts_per_tok=2)
    return tiny(config, dtype=torch.float32), tokens()


@functools.cache
def largest(name: str) -> tuple[Region, ...]:
    return largest_regions(program(name)[0])


def described(name: str, region: Region) -> str:
    """A region's group, its heads, and the last names of the weights it changes."""
    paths = {program(name)[0].site(site.use) for site in region.sites}
    short = {re.sub(r"\.(weight|bias)$", "", path).rpartition(".")[2] for path in paths}
    heads = f"{region.heads} x " if region.heads > 1 else ""
    return f"{region.group.name} {heads}{region.width} {'+'.join(sorted(short))}"


# what some architectures must have, besides what turns
EXPECTED = {
    "llama": (
        "GENERAL 2 x 8 o_proj+v_proj",
        "ROPE_PLANES 4 x 2 k_proj+q_proj",
        "DIAGONAL 80 down_proj+up_proj",
        "PERMUTATION 80 down_proj+gate_proj+up_proj",
        "PERMUTATION 2 k_proj+o_proj+q_proj+v_proj",
        "PERMUTATION 2 x 3 o_proj+q_proj",
        "IDENTITY 64 lm_head",
    ),
    "llama_biased_eager": (
        "GENERAL 3 x 8 o_proj+v_proj",
        "ROPE_PLANES 4 x 2 k_proj+q_proj",
        "DIAGONAL 80 down_proj+up_proj",
        "PERMUTATION 80 down_proj+gate_proj+up_proj",
        "PERMUTATION 3 k_proj+o_proj+q_proj+v_proj",
    ),
    "phi3": (
        "GENERAL 2 x 8 o_proj+qkv_proj",
        "ROPE_PLANES 4 x 2 qkv_proj",
        "DIAGONAL 80 down_proj+gate_up_proj",
        "PERMUTATION 80 down_proj+gate_up_proj",
    ),
    "opt": (
        "GENERAL 3 x 12 out_proj+v_proj",
        "GENERAL 3 x 12 k_proj+q_proj",
        "POSITIVE_DIAGONAL 52 fc1+fc2",
        "PERMUTATION 52 fc1+fc2",
        "PERMUTATION 3 k_proj+out_proj+q_proj+v_proj",
    ),
    "gpt2": ("PERMUTATION 144 c_fc+c_proj", "PERMUTATION 3 c_attn+c_proj"),
    "gpt_neox": ("ROPE_PLANES 6 x 2 query_key_value", "GENERAL 6 x 4 query_key_value"),
    "qwen3": ("PLANE_SCALES 6 x 2 k_norm+q_norm", "DIAGONAL 80 down_proj+up_proj"),
    "bert": ("GENERAL 3 x 12 dense+value", "PERMUTATION 52 dense"),
    "SquaredRelu": ("POSITIVE_DIAGONAL 10 first+last", "PERMUTATION 10 first+last"),
    "Bilinear": ("DIAGONAL 10 first+last", "PERMUTATION 10 first+gate+last"),
    "ScaledHeads": ("GENERAL 3 x 4 first+last", "PERMUTATION 3 first+gate+last"),
    "Blocks": ("GENERAL 3 x 4 first+last", "PERMUTATION 3 first+gate+last"),
    "mixtral": (
        "DIAGONAL 80 down_proj+gate_up_proj",
        "PERMUTATION 80 down_proj+gate_up_proj",
        "IDENTITY 4 gate",
    ),
    "Mixture": ("PERMUTATION 4 down+router+up", "PERMUTATION 6 down+up"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_groups_of_an_architecture(name: str) -> None:
    found = {described(name, region) for region in largest(name)}
    assert found >= set(EXPECTED[name]), sorted(found)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_free_under_a_group_is_free(name: str) -> None:
    folded, flat, want = program(name)
    for group in Group:
        regions = [r for r in find_regions(folded, group) if r.free and fits(r, group)]
        assert not changes_output(folded, regions, flat, want), group


@pytest.mark.parametrize("name", NAMES)
def test_groups_compose(name: str) -> None:
    folded, flat, want = program(name)
    regions = [region for region in largest(name) if region.free]
    assert len({region.group for region in regions}) > 1
    assert not changes_output(folded, regions, flat, want)


@pytest.mark.parametrize("name", NAMES)
def test_no_larger_group_would_do(name: str) -> None:
    folded, flat, want = program(name)
    seen: set[str] = set()
    for region in largest(name):
        kind = re.sub(r"\d+", "#", f"{region.group} {region.name}")
        if kind in seen:
            continue
        seen.add(kind)
        assert region.group is Group.GENERAL or region.bounds, region.name
        for bound in region.bounds:
            seed = next((s for s in range(9) if larger(region, bound.group, s)), None)
            if seed is None:
                assert region.width <= 2 or bound.group in PLANES
                continue
            changed = copied(folded)
            change(changed, region, seed, bound.group)
            got = changed.run(*flat, widen=True)[0]
            assert differs(got, want), f"{region.name} is free under {bound.group}"


def larger(region: Region, group: Group, seed: int) -> bool:
    """Whether a drawn element of the group is not one of the region's own for some head.

    Of width 2, what fixes all-ones is a permutation; of odd widths there are no planes.
    """
    if not fits(region, group):
        return False
    drawn = matrices(group, region.width, region.heads, seed)
    return any(not contains(region.group, matrix) for matrix in drawn)
