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
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

MARK = "RESULT "
Row = dict[str, Any]
# seconds
PART_LIMIT = 150
WHOLE_LIMIT = 460
DECODE_TIME = 25
# parts that only check, not time, share the GPU
AT_ONCE = 8
# models that decode a token, and by how much those of 4-bit weights are faster, in CUDA graphs
DECODERS = ("bf16", "backend", "module")
DECODE_BAR = 1.8
# what the GPU reaches, as JSON
LIMITS = "QPASS_CHECK_LIMITS"
# a file that is there once decoders may time
TURN = "QPASS_CHECK_TURN"
COMPILERS = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--part", help="run one part in this process")
    parser.add_argument("--only", help="parts whose name contains this", default="")
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
        _say("no CUDA device: not timed")
        return 0
    deadline = time.monotonic() + options.limit
    rows: list[Row] = []

    def write() -> None:
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    names = [name for name in _parts() if options.only in name or name == "limits"]
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
        with concurrent.futures.ThreadPoolExecutor(len(DECODERS)) as pool:
            # they prepare their models while others run
            coming = [pool.submit(_apart, name, deadline) for name in decoders]
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
    rows += _gains(rows)
    write()
    _say("")
    _print(rows)
    if options.table:
        _write_table(rows, options.table)
    return 0 if all(row.get("ok", True) for row in rows) else 1


def _gains(rows: list[Row]) -> list[Row]:
    """How much faster the decoders of 4-bit weights are than that of bfloat16."""
    took = {row["part"]: row["ms"] for row in rows if "ms" in row}
    plain = took.pop("decode:bf16", None)
    return [
        {
            "part": part,
            "name": f"w4a16 {part.partition(':')[2]} over bf16, a token in CUDA graphs",
            "gain": plain / ms,
            "bar": DECODE_BAR,
            "ok": plain / ms >= DECODE_BAR,
        }
        for part, ms in took.items()
        if plain is not None
    ]


def _operators() -> list[str]:
    from qpass.runtime.gpu import KERNELS
    from tests.kernels.gpu.timed import timed

    # those that have bars come first
    barred = {case.operator for case in timed() if case.bar is not None}
    found = dict.fromkeys(kernel.operator for kernel in KERNELS)
    return sorted(found, key=lambda operator: operator not in barred)


def _write_table(rows: list[Row], path: Path) -> None:
    """The fastest configurations of all operators, with those the table has of others."""
    from qpass.runtime.tuned import Table

    whole = Table.load(path) if path.exists() else None
    for row in rows:
        if "table" in row:
            found = Table(**row["table"])
            whole = found if whole is None else whole.joined(found)
    if whole is not None:
        whole.save(path)
        _say(f"wrote {path}; QPASS_GPU_TABLE={path} puts it to use")


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
    _print(rows)
    if ended is not None:
        other = [line for line in lines if not line.startswith(MARK)]
        rows.append({"part": name, "ok": False, "why": f"{ended}: " + "\n".join(other[-12:])})
    rows.append({"part": name, "name": "took", "seconds": time.monotonic() - begun})
    _say(f"{name}: {time.monotonic() - begun:.0f} s")
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
        _say(MARK + json.dumps(row))
    return 0


def _guarded(name: str, run: Callable[[], Row]) -> Row:
    """The row that `run` returns, or one that says how it failed."""
    try:
        return {"name": name, **run()}
    except Exception:  # noqa: BLE001 whatever a kernel does wrong is a row of the report
        return {"name": name, "ok": False, "why": traceback.format_exc()[-1500:]}


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
    tried = 0
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    for case in cases():
        if case.operator != kernel.operator or kernel.accepts(case.call(on)) is not None:
            continue
        tried += 1
        moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case.arguments]
        call = Call.of(case.operator, moved, on)

        def run(call: Call = call, case: Any = case) -> Row:
            got = kernel.launch(call)
            got = tuple(t.cpu() for t in got) if isinstance(got, tuple) else got.cpu()
            host = case.call(on)
            return {"why": disagreement(host, got, specification(case.operator)(*host.values))}

        if why := _guarded(case.name, run)["why"]:
            wrong.append(f"{case.name}: {why}")
    yield {"name": f"{name}: {tried} odd calls", "ok": not wrong, "why": "\n".join(wrong[:6])}


def _time(operator: str) -> Iterator[Row]:
    """Models' shapes: checked against the specification on the GPU, then timed."""
    from tests.kernels.gpu.timed import limits, timed

    known = json.loads(os.environ.get(LIMITS, "{}"))
    reached = known if "bandwidth" in known else limits()
    for case in timed():
        if case.operator == operator:
            yield _guarded(case.name, lambda case=case: _time_one(case, reached))
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
    """Compile a share of the configurations, so that they are known when they are timed."""
    operator, _, share = which.partition(":")
    number = 0
    for kernel, call, case in _tunable(operator):
        for candidate in kernel.tuning.candidates(call):
            number += 1
            if number % COMPILERS == int(share):
                row = _guarded(
                    f"{case.name} {candidate}",
                    lambda k=kernel, c=call, v=candidate: {"why": str(k.tuning.run(c, v))[:0]},
                )
                if not row.get("ok", True):
                    yield row


def _tunable(operator: str) -> Iterator[tuple[Any, Any, Any]]:
    """Kernels, calls they serve in several ways, and the cases these come from."""
    from qpass.runtime.gpu import KERNELS, Call
    from qpass.runtime.target import Target, target_of
    from tests.kernels.gpu.timed import timed

    on = target_of(0)
    assert isinstance(on, Target)
    for case in timed():
        if case.operator != operator:
            continue
        call = Call.of(case.operator, case.make(), on)
        for kernel in KERNELS:
            if kernel.operator == operator and kernel.tuning and kernel.accepts(call) is None:
                yield kernel, call, case


def _tune(operator: str) -> Iterator[Row]:
    """Time every configuration of every kernel: a table, and the best four of a shape to read."""
    import dataclasses

    import torch

    from qpass.runtime.gpu import Call
    from qpass.runtime.tuned import tune
    from tests.kernels.gpu.timed import seconds, sets

    found = list(_tunable(operator))
    cases = {id(call): case for _, call, case in found}
    best: dict[str, list[tuple[float, str]]] = {}
    operands: dict[int, list[Any]] = {}

    def clock(kernel: Any, call: Any, candidate: Any) -> float | None:
        case = cases[id(call)]
        if id(call) not in operands:
            operands.clear()
            cost = kernel.cost(call)
            floor = call.target.seconds(cost.nbytes, cost.operations, cost.kind)
            more = range(sets(cost.nbytes, floor) - 1)
            made = [Call.of(case.operator, case.make(), call.target) for _ in more]
            operands[id(call)] = [call, *made]

        def timed_once() -> Row:
            calls = operands[id(call)]
            return {"us": seconds([lambda c=c: kernel.tuning.run(c, candidate) for c in calls])}

        took = _guarded(case.name, timed_once).get("us")
        if took is not None:
            best.setdefault(case.name, []).append((took * 1e6, f"{kernel.name} {candidate}"))
        return took

    table = tune(torch.cuda.get_device_name(0), [(k, c) for k, c, _ in found], clock)
    yield {"table": dataclasses.asdict(table)}
    for name, times in best.items():
        yield {"name": name, "best": [f"{us:.1f} {label}" for us, label in sorted(times)[:4]]}


def _model(recipe: str) -> Iterator[Row]:
    from tests.kernels.gpu.models import agreement

    yield from (_guarded(name, run) for name, run in agreement(recipe))


def _decode(which: str) -> Iterator[Row]:
    from tests.kernels.gpu.models import decoding

    def ready() -> None:
        turn = Path(os.environ[TURN])
        while not turn.exists():
            time.sleep(0.1)
        # one after another
        mine = turn.with_name("busy").open("w")
        fcntl.flock(mine, fcntl.LOCK_EX)
        kept.append(mine)

    kept: list[Any] = []
    yield _guarded(f"decode {which}", lambda: decoding(which, ready))


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _print(rows: list[Row]) -> None:
    """A compact table, failures first in full."""
    for row in rows:
        if not row.get("ok", True) and (row.get("why") or "bar" not in row):
            _say(f"FAILED {row['part']} {row.get('name', '')}: {str(row.get('why'))[-600:]}")
    for row in rows:
        if row.get("name") in ("machine", "limits"):
            _say({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()})
        elif "us" in row:
            times = f" {row['times_bf16']:5.2f}x bf16" if "times_bf16" in row else ""
            _say(
                f"{_verdict(row)} {row['name']:42s} {row['kernel']:24s}"
                f" {row['us']:9.1f} us {row['gbs']:7.0f} GB/s {row['tops']:7.1f} TOPS"
                f" {row['fraction']:6.1%}{_bar(row)}{times}"
            )
        elif row.get("name") != "took" and "table" not in row:
            hidden = ("part", "name", "ok", "why", "bar")
            rest = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            rest = {k: v for k, v in rest.items() if k not in hidden}
            _say(f"{_verdict(row)} {row.get('name')} {rest or ''}{_bar(row)}")


def _verdict(row: Row) -> str:
    wrong = not row.get("ok", True) and (row.get("why") or not row.get("bar"))
    return "BAD" if wrong else "ok "


def _bar(row: Row) -> str:
    """Whether a figure met its bar, where it has one."""
    if not row.get("bar"):
        return ""
    reached = row.get("fraction", row.get("gain", 0.0)) >= row["bar"]
    return f" (bar {row['bar']:g}: {'met' if reached else 'MISSED'})"


if __name__ == "__main__":
    sys.exit(main())
