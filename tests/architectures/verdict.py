"""Which targets the results of all architectures are held to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tests.architectures.measure import LIMIT, Result

# decoders whose norms come before their blocks and whose last norm feeds the head: dense, fused,
# parallel, latent and with experts
_PRE_NORM = (
    "arcee cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone falcon gemma glm gpt2 "
    "gpt_bigcode gpt_neo gpt_neox gptj granite helium llama minicpm3 mistral mixtral mpt "
    "nemotron olmo olmoe opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss "
    "smollm3 stablelm starcoder2"
)
PRE_NORM = frozenset(_PRE_NORM.split())


class Target(NamedTuple):
    """One target: what is asked, what was found, whether that is enough, and who misses it."""

    asked: str
    found: str
    met: bool
    missing: tuple[str, ...] = ()


def targets(results: Sequence[Result]) -> tuple[Target, ...]:
    """All targets, over the models that could be built."""
    built = [r for r in results if r.status != "no model"]
    compared = [r for r in built if r.error is not None]
    exact = [r for r in compared if r.status == "ok"]
    wrong = _names(r for r in built if r.status == "wrong")
    raised = _names(r for r in built if r.status in ("crash", "died"))
    late = _names(r for r in built if r.status == "timeout")
    untraced = _names(r for r in built if r.status == "untraceable")
    refused = _names(r for r in built if r.status == "refused")
    decoders = [r for r in compared if r.type in PRE_NORM]
    flat = _names(r for r in decoders if r.stream < 0.9)
    low = _names(r for r in compared if r.folded + r.online < 0.8)
    values = _names(r for r in compared if r.values)
    return (
        Target(f"error at most {LIMIT:.0e} on 150 types", str(len(exact)), len(exact) >= 150),
        Target("no error above", str(len(wrong)), not wrong, wrong),
        Target("no uncaught exception", str(len(raised)), not raised, raised),
        Target("none refused as a whole", str(len(refused)), not refused, refused),
        Target("all in time", str(len(late)), not late, late),
        Target(
            "at most 5 % untraceable",
            f"{len(untraced)} of {len(built)}",
            len(untraced) <= 0.05 * len(built),
            untraced,
        ),
        Target(
            "folded 0.9 of what reads hidden states, on every pre-norm decoder",
            f"{len(decoders) - len(flat)} of {len(decoders)}",
            not flat,
            flat,
        ),
        Target(
            "folded and online 0.8, on 90 % of all",
            f"{len(compared) - len(low)} of {len(compared)}",
            len(low) <= 0.1 * len(compared),
            low,
        ),
        Target("V to O folded wherever it may turn", str(len(values)), not values, values),
    )


def summary(results: Sequence[Result]) -> str:
    """The counts of each status, and one line for each target."""
    counts = Counter(r.status for r in results)
    lines = ["", ", ".join(f"{n} {status}" for status, n in counts.most_common()), ""]
    for target in targets(results):
        state = "met   " if target.met else "MISSED"
        names = ": " + " ".join(target.missing) if target.missing else ""
        lines.append(f"{state} {target.asked}: {target.found}{names}")
    return "\n".join(lines)


def _names(results: object) -> tuple[str, ...]:
    return tuple(sorted(r.type for r in results))  # type: ignore
