"""A process with one engine and one model, which is told what to do in lines of JSON.

It runs in the engine's environment, so on the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol


class Engine(Protocol):
    """A model that reads tokens and says which comes next, greedily."""

    def prefill(self, tokens: Sequence[int]) -> int:
        """Forget what was read, read `tokens`; the next one."""
        ...

    def step(self, token: int) -> int:
        """Read one more; the next one."""
        ...


# variant, where the model lies in the engine's form, threads, room for so many tokens
Load = Callable[[str, Path, int, int], Engine]
# variant, directory of the checkpoint, where the engine's form goes
Convert = Callable[[str, Path, Path], None]


def main(load: Load, convert: Convert) -> None:
    """`convert VARIANT CHECKPOINT OUT`, or `serve VARIANT MODEL THREADS ROOM`."""
    what, variant, *rest = sys.argv[1:]
    if what == "convert":
        convert(variant, Path(rest[0]), Path(rest[1]))
        return
    # libraries write where they like; answers have a channel of their own
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before, begin = _memory("VmRSS"), time.perf_counter()
    engine = load(variant, Path(rest[0]), int(rest[1]), int(rest[2]))
    loaded = time.perf_counter() - begin
    print(json.dumps({"load": loaded}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = _follow(engine, asked) if "follow" in asked else _timed(engine, asked)
        answer["megabytes"] = round(_memory("VmHWM") - before)
        print(json.dumps(answer), file=answers, flush=True)


def _timed(engine: Engine, asked: dict[str, list[int] | int]) -> dict[str, object]:
    """Seconds to the first token, then for each of `tokens` more."""
    begin = time.perf_counter()
    after_prompt = token = engine.prefill(asked["prompt"])
    first = time.perf_counter() - begin
    times: list[float] = []
    for _ in range(asked["tokens"]):
        begin = time.perf_counter()
        token = engine.step(token)
        times.append(time.perf_counter() - begin)
    return {"first": first, "each": times, "next": after_prompt}


def _follow(engine: Engine, asked: dict[str, list[int]]) -> dict[str, object]:
    """What would come next, after a prompt and after each token of a text that follows it."""
    says = [engine.prefill(asked["prompt"])]
    return {"says": says + [engine.step(token) for token in asked["follow"]]}


def _memory(which: str) -> float:
    """Megabytes of this process: now (VmRSS), or at most (VmHWM)."""
    found = re.search(rf"{which}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else float("nan")
