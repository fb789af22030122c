"""A process with one engine and one model, which is told what to do in lines of JSON.

It runs in the engine's environment, so on the standard library and NumPy alone.
"""

# b prompts read at once, v entries of the vocabulary

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# prompts of one length, side by side
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Setting:
    """What an engine may prepare for: `prompt` is the length of those that are read at once."""

    threads: int
    room: int  # tokens of each sequence
    batch: int = 1
    prompt: int = 512


class Engine(Protocol):
    """A model that reads tokens and scores those that may come next, `[b, v]`."""

    def prefill(self, prompts: Prompts) -> np.ndarray:
        """Forget what was read, read `prompts`; scores after each."""
        ...

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Read one more token of each; scores after it."""
        ...


# variant, where the model lies in the engine's form
Load = Callable[[str, Path, Setting], Engine]
# variant, directory of the checkpoint, where the engine's form goes
Convert = Callable[[str, Path, Path], None]


def main(load: Load, convert: Convert) -> None:
    """`convert VARIANT CHECKPOINT OUT`, or `serve VARIANT MODEL THREADS ROOM BATCH PROMPT`."""
    what, variant, *rest = sys.argv[1:]
    if what == "convert":
        convert(variant, Path(rest[0]), Path(rest[1]))
        return
    # libraries write where they like; answers have a channel of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before, begin = _memory("VmRSS"), time.perf_counter()
    engine = load(variant, Path(rest[0]), Setting(*map(int, rest[1:])))
    loaded = time.perf_counter() - begin
    print(json.dumps({"load": loaded}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _follow(engine, asked) if "follow" in asked else _timed(engine, asked)
        answer["megabytes"] = round(_memory("VmHWM") - before)
        print(json.dumps(answer), file=answers, flush=True)


def _timed(engine: Engine, asked: dict[str, Any]) -> dict[str, object]:
    """Seconds to the first token of every prompt, then for each of `tokens` more."""
    begin = time.perf_counter()
    after_prompt = likeliest = engine.prefill(asked["prompts"]).argmax(-1).tolist()
    first = time.perf_counter() - begin
    times: list[float] = []
    for _ in range(asked["tokens"]):
        begin = time.perf_counter()
        likeliest = engine.step(likeliest).argmax(-1).tolist()
        times.append(time.perf_counter() - begin)
    return {"first": first, "each": times, "next": after_prompt}


def _follow(engine: Engine, asked: dict[str, Any]) -> dict[str, object]:
    """Scores after a prompt and after each token of a text that follows it, `[t, v]`, to a file."""
    scores = [engine.prefill([asked["prompt"]])[0].copy()]
    scores += [engine.step([token])[0].copy() for token in asked["follow"]]
    np.save(asked["save"], np.stack(scores).astype(np.float32))
    return {}


def _memory(which: str) -> float:
    """Megabytes of this process: now (VmRSS), or at most (VmHWM)."""
    found = re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else float("nan")
