"""Are forty architectures the same functions after all that turns is turned?"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest

import qpass
from tests.architectures.catalogue import architecture
from tests.architectures.measure import EAGER_LIMIT, Result, measure
from tests.architectures.models import subject
from tests.architectures.surface import ABSENT, REFUSED, SAME, surface
from tests.architectures.verdict import targets

# those that differ most in how they are built and are traced in a few seconds; `make zoo` has all
_CHOSEN = (
    "bloom codegen cohere ctrl falcon gemma2 gpt2 gptj gpt_bigcode hubert whisper gpt_neox granite "
    "llama mpt nemotron olmo2 openai-gpt opt phi phi3 qwen2 qwen3 stablelm "
    "starcoder2 glm4 gemma3_text albert bert deberta-v2 distilbert electra mpnet roberta "
    "ernie bart vit dinov2 deit wav2vec2"
)
CHOSEN = _CHOSEN.split()


@pytest.mark.parametrize("name", CHOSEN)
def test_an_architecture_stays_the_same_function(name: str) -> None:
    with warnings.catch_warnings():
        # of transformers and of the tracing of its models
        warnings.simplefilter("ignore")
        result = measure(architecture(name), inspected=False)
    assert result.status == "ok", result
    assert result.folded + result.online > 0
    assert result.folded + result.online >= 0.8


def test_there_are_forty() -> None:
    assert len(set(CHOSEN)) == 40


@pytest.mark.parametrize(
    "name",
    # parts that must agree, cut stages, kept stages, sizes by layer, codes beside tokens, frames
    # beside tokens, patches of any shape
    ["canary", "pvt", "levit", "dots3_note", "dia", "voxtral_realtime", "siglip2"],
)
def test_a_config_of_parts_or_stages_is_made_small(name: str) -> None:
    tiny = subject(architecture(name))
    assert sum(p.numel() for p in tiny.model.parameters()) < 300_000
    assert [o.shape for o in tiny.outputs[0]] != [o.shape for o in tiny.outputs[1]]


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_what_a_model_shows_stays_or_is_refused(name: str) -> None:
    tiny = subject(architecture(name))
    original = copy.deepcopy(tiny.model)
    qpass.rotate(tiny.model, tiny.first)
    found = surface(original, tiny.model, tiny.first, EAGER_LIMIT)
    assert all(said in (SAME, ABSENT) or said.startswith(REFUSED) for said in found.values())
    assert found["hidden_states"] == found["saved_and_loaded"] == SAME


def test_what_a_model_shows_is_compared() -> None:
    tiny = subject(architecture("gpt2"))
    other = copy.deepcopy(tiny.model)
    other.transformer.h[1].mlp.c_fc.weight.data *= 1.01
    found = surface(tiny.model, other, tiny.first, EAGER_LIMIT)
    assert len(found) == 5
    assert all(said.startswith("moved by") for said in found.values())


GOOD = Result("llama", "causal", error=1e-15, folded=0.8, online=0.2, stream=1.0)


@pytest.mark.parametrize(
    "bad",
    [
        replace(GOOD, status="wrong"),
        replace(GOOD, status="crash", error=None),
        replace(GOOD, status="died", error=None),
        replace(GOOD, status="timeout", error=None),
        replace(GOOD, status="refused", error=None),
        replace(GOOD, stream=0.8),
        replace(GOOD, values=["a.weight"]),
    ],
    ids=lambda bad: bad.status,
)
def test_one_bad_result_misses_a_target(bad: Result) -> None:
    assert all(target.met for target in targets([GOOD] * 200))
    assert not all(target.met for target in targets([*[GOOD] * 200, bad]))


def test_several_may_be_untraceable_or_covered_little() -> None:
    untraced = replace(GOOD, status="untraceable", error=None)
    assert all(target.met for target in targets([*[GOOD] * 190, *[untraced] * 10]))
    assert not all(target.met for target in targets([*[GOOD] * 180, *[untraced] * 10]))
    little = replace(GOOD, folded=0.1, online=0.1)
    assert all(target.met for target in targets([*[GOOD] * 180, *[little] * 20]))
    assert not all(target.met for target in targets([*[GOOD] * 180, *[little] * 21]))
    assert not all(target.met for target in targets([GOOD] * 149))
