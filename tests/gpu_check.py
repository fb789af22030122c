"""`python tests/gpu_check.py --json FILE`: builds, checks and times everything on a real GPU.

Every part runs in a process of its own: a kernel that breaks the GPU's context breaks only itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.kernels.gpu.report import Row, gains, guarded, say, show  # noqa: E402 found from there

MARK = "RESULT "
# seconds
PART_LIMIT = 150
WHOLE_LIMIT = 460
DECODE_TIME = 25
# parts that only check, not time, share the GPU; most of their time a processor compiles
AT_ONCE = max(2, (os.cpu_count() or 8) - 4)
# odd calls of a kernel that are repeated here; the interpreter has tried them all
MOST = 24
# models that decode a token
DECODERS = ("bf16", "backend", "module")
# what the GPU reaches, as JSON
LIMITS = "QPASS_CHECK_LIMITS"
# a file that is there once decoders may time
TURN = "QPASS_CHECK_TURN"
COMPILERS = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--part", help="run one part in this process")
    parser.add_argument("--only", help="parts whose name contains one of these", nargs="*")
    parser.add_argument(
        "--tune", help="time all configurations of these operators, or of all", nargs="*"
    )
    parser.add_argument("--table", type=Path, help="where the fastest configurations go")
    parser.add_argument("--limit", type=float, help="seconds for everything", default=WHOLE_LIMIT)
    options = parser.parse_args()
    if options.part:
        return _in_process(options.part)
    import torch

    if not torch.cuda.is_available():
        say("no CUDA device: not timed")
        return 0
    deadline = time.monotonic() + options.limit
    rows: list[Row] = []

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    wanted = [*(options.only or [""]), "limits"]
    names = [name for name in _parts() if any(part in name for part in wanted)]
    if options.tune is not None:
        options.tune = options.tune or _operators()
        names = ["limits", *(f"tune:{o}" for o in options.tune)]
        names += [f"warm:{o}:{i}" for o in options.tune for i in range(COMPILERS)]

    def together(parts: list[str], workers: int) -> None:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for found in pool.map(lambda name: _apart(name, deadline), parts):
                rows.extend(found)
                write()

    with tempfile.TemporaryDirectory() as folder:
        turn = Path(folder) / "turn"
        os.environ[TURN] = str(turn)
        decoders = [name for name in names if name.startswith("decode:")]
        for name in DECODERS:
            if f"decode:{name}" not in decoders:
                _prepared(turn, f"decode:{name}").touch()
        with concurrent.futures.ThreadPoolExecutor(len(DECODERS)) as pool:
            # they prepare their models while others run
            coming = [pool.submit(_apart, name, deadline) for name in decoders]
            for name, found in zip(decoders, coming, strict=True):
                prepared = _prepared(turn, name)
                found.add_done_callback(lambda _, prepared=prepared: prepared.touch())
            together([n for n in names if n.startswith("warm:")], COMPILERS)
            together([n for n in names if n.startswith(("check:", "model:"))], AT_ONCE)
            for name in names:
                if name.startswith(("limits", "time:", "tune:")):
                    rows += _apart(name, deadline)
                    write()
                if name == "limits":
                    found = next((row for row in rows if row.get("name") == "limits"), {})
                    os.environ[LIMITS] = json.dumps(found)
            turn.touch()
            for found in coming:
                rows += found.result()
    rows += gains(rows)
    write()
    say("")
    show(rows)
    if options.table:
        from tests.kernels.gpu.tuning import write_table

        write_table(rows, options.table)
    return 0 if all(row.get("ok", True) for row in rows) else 1


def _operators() -> list[str]:
    from qpass.runtime.gpu import KERNELS
    from tests.kernels.gpu.timed import timed

    # those that have bars come first
    barred = {case.operator for case in timed() if case.bar is not None}
    found = dict.fromkeys(kernel.operator for kernel in KERNELS)
    return sorted(found, key=lambda operator: operator not in barred)


def _parts() -> list[str]:
    from qpass.runtime.gpu import KERNELS

    # those that calls meet first
    ordered = sorted(KERNELS, key=lambda kernel: -kernel.preference)
    checks = [f"check:{kernel.name}" for kernel in ordered]
    models = [f"model:{name}" for name in ("w4a16-g64", "w8a8", "mxfp4", "nvfp4")]
    decoders = [f"decode:{name}" for name in DECODERS]
    return [*decoders, "limits", *checks, *models, *(f"time:{o}" for o in _operators())]


def _apart(name: str, deadline: float) -> list[Row]:
    """Run a part in another process; whatever becomes of it is a row."""
    left = deadline - time.monotonic()
    if not name.startswith("decode:"):
        # decoders wait for the others, and then need a while
        left = min(PART_LIMIT, left - DECODE_TIME)
    if left < 5:
        return [{"part": name, "ok": False, "why": "no time left"}]
    begun = time.monotonic()
    command = [sys.executable, "-W", "ignore", __file__, "--part", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if name.startswith("check:"):
        # deterministic algorithms, which fill fresh memory with NaN, ask this of cuBLAS
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as child:
        try:
            said, _ = child.communicate(timeout=left)
            ended = None if child.returncode == 0 else f"exit status {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
            ended = f"stopped after {left:.0f} s"
    lines = said.splitlines()
    rows = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    rows = [{"part": name, **row} for row in rows]
    show(rows)
    if ended is not None:
        other = [line for line in lines if not line.startswith(MARK)]
        rows.append({"part": name, "ok": False, "why": f"{ended}: " + "\n".join(other[-12:])})
    rows.append({"part": name, "name": "took", "seconds": time.monotonic() - begun})
    say(f"{name}: {time.monotonic() - begun:.0f} s")
    return rows


def _in_process(part: str) -> int:
    kind, _, name = part.partition(":")
    runs: dict[str, Callable[[str], Iterator[Row]]] = {
        "limits": _limits,
        "check": _check,
        "time": _time,
        "model": _model,
        "decode": _decode,
        "warm": _warm,
        "tune": _tune,
    }
    for row in runs[kind](name):
        say(MARK + json.dumps(row))
    return 0


def _limits(_: str) -> Iterator[Row]:
    import torch
    import triton

    from qpass.runtime.target import target_of
    from tests.kernels.gpu.timed import limits

    found = target_of(0)
    yield {
        "name": "machine",
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "target": found if isinstance(found, str) else found.name,
    }
    yield {"name": "limits", **limits()}


def _check(name: str) -> Iterator[Row]:
    """The odd shapes of the interpreted tests, on hardware, against the CPU."""
    import torch

    from qpass.ops.library import specification
    from qpass.runtime.gpu import KERNELS, Call
    from qpass.runtime.target import Target, target_of
    from tests.kernels.gpu.agreement import disagreement
    from tests.kernels.gpu.calls import cases

    kernel, on = KERNELS[name], target_of(0)
    if not isinstance(on, Target):
        yield {"name": name, "ok": False, "why": on}
        return
    wrong: list[str] = []
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    found = [case for case in cases() if case.operator == kernel.operator]
    found = [case for case in found if kernel.accepts(case.call(on)) is None]
    found = found[:: -(-len(found) // MOST) or 1]
    for case in found:
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case.arguments]
        call = Call.of(case.operator, moved, on)

        def run(call: Call = call, case: Any = case) -> Row:
            got = kernel.launch(call)
            got = tuple(t.cpu() for t in got) if isinstance(got, tuple) else got.cpu()
            host = case.call(on)
            return {"why": disagreement(host, got, specification(case.operator)(*host.values))}

        if why := guarded(case.name, run)["why"]:
            wrong.append(f"{case.name}: {why}")
    yield {"name": f"{name}: {len(found)} odd calls", "ok": not wrong, "why": "\n".join(wrong[:6])}


def _time(operator: str) -> Iterator[Row]:
    """Models' shapes: checked against the specification on the GPU, then timed."""
    from tests.kernels.gpu.timed import limits, timed

    known = json.loads(os.environ.get(LIMITS, "{}"))
    reached = known if "bandwidth" in known else limits()
    for case in timed():
        if case.operator == operator:
            yield guarded(case.name, lambda case=case: _time_one(case, reached))
            _forget()


def _forget() -> None:
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _time_one(case: Any, reached: dict[str, float]) -> Row:
    import torch

    from qpass.ops.library import specification
    from qpass.runtime.gpu import Call, choose
    from qpass.runtime.target import Target, target_of
    from tests.kernels.gpu.agreement import disagreement
    from tests.kernels.gpu.timed import seconds, sets

    on = target_of(0)
    assert isinstance(on, Target)
    call = Call.of(case.operator, case.make(), on)
    kernel = choose(call).kernel
    if kernel is None:
        return {"ok": case.bar is None, "why": choose(call).choice().text()}
    got = kernel.launch(call)
    wrong = disagreement(call, got, specification(case.operator)(*call.values))
    cost = kernel.cost(call)
    peak = reached.get(cost.kind, on.peak.get(cost.kind, on.peak["fp32"]))
    floor = max(cost.nbytes / reached["bandwidth"], cost.operations / peak)
    many = [Call.of(case.operator, case.make(), on) for _ in range(sets(cost.nbytes, floor))]
    took = seconds([lambda c=c: kernel.launch(c) for c in many])
    del many
    fraction = floor / took
    row: Row = {
        "kernel": kernel.name,
        "us": took * 1e6,
        "gbs": cost.nbytes / took / 1e9,
        "tops": cost.operations / took / 1e12,
        "fraction": fraction,
        "bar": case.bar,
        "ok": wrong is None and (case.bar is None or fraction >= case.bar),
        "why": wrong,
    }
    if case.operator in ("linear.real", "linear.codes"):
        rows, k, n = call.values[0].shape[0], call["in_features"], call["out_features"]
        weights = [
            torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
            for _ in range(sets(2 * n * k, floor))
        ]
        x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
        plain = seconds([lambda w=w: torch.nn.functional.linear(x, w) for w in weights])
        row["times_bf16"] = plain / took
    return row


def _warm(which: str) -> Iterator[Row]:
    from tests.kernels.gpu.tuning import warm

    yield from warm(which, COMPILERS)


def _tune(operator: str) -> Iterator[Row]:
    from tests.kernels.gpu.tuning import timings

    yield from timings(operator)


def _model(recipe: str) -> Iterator[Row]:
    from tests.kernels.gpu.models import agreement

    yield from (guarded(name, run) for name, run in agreement(recipe))


def _prepared(turn: Path, decoder: str) -> Path:
    """A file that is there once a decoder waits for its turn, or has ended."""
    return turn.with_name(decoder.replace(":", "-"))


def _decode(which: str) -> Iterator[Row]:
    from tests.kernels.gpu.models import decoding

    def ready() -> None:
        turn = Path(os.environ[TURN])
        _prepared(turn, f"decode:{which}").touch()
        # what prepares beside it would slow down Python, which asks for each token
        wanted = [turn, *(_prepared(turn, f"decode:{name}") for name in DECODERS)]
        while not all(path.exists() for path in wanted):
            time.sleep(0.1)
        # one after another
        mine = turn.with_name("busy").open("w")
        fcntl.flock(mine, fcntl.LOCK_EX)
        kept.append(mine)

    kept: list[Any] = []
    yield guarded(f"decode {which}", lambda: decoding(which, ready))


if __name__ == "__main__":
    sys.exit(main())
