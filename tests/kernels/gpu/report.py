"""What a check on a GPU found, as lines to read: figures, bars, failures."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
# by how much decoders of 4-bit weights are faster than bfloat16, in CUDA graphs
DECODE_BAR = 1.8


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def guarded(name: str, run: Callable[[], Row]) -> Row:
    """The row that `run` returns, or one that says how it failed."""
    try:
        return {"name": name, **run()}
    except Exception:  # noqa: BLE001 whatever a kernel does wrong is a row of the report
        return {"name": name, "ok": False, "why": traceback.format_exc()[-1500:]}


def gains(rows: list[Row]) -> list[Row]:
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


def show(rows: list[Row]) -> None:
    """A compact table, failures first in full."""
    for row in rows:
        if not row.get("ok", True) and (row.get("why") or "bar" not in row):
            say(f"FAILED {row['part']} {row.get('name', '')}: {str(row.get('why'))[-600:]}")
    for row in rows:
        if row.get("name") in ("machine", "limits"):
            say({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()})
        elif "us" in row:
            times = f" {row['times_bf16']:5.2f}x bf16" if "times_bf16" in row else ""
            say(
                f"{_verdict(row)} {row['name']:42s} {row['kernel']:24s}"
                f" {row['us']:9.1f} us {row['gbs']:7.0f} GB/s {row['tops']:7.1f} TOPS"
                f" {row['fraction']:6.1%}{_bar(row)}{times}"
            )
        elif row.get("name") != "took" and "table" not in row:
            hidden = ("part", "name", "ok", "why", "bar")
            rest = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            rest = {k: v for k, v in rest.items() if k not in hidden}
            say(f"{_verdict(row)} {row.get('name')} {rest or ''}{_bar(row)}")


def _verdict(row: Row) -> str:
    wrong = not row.get("ok", True) and (row.get("why") or not row.get("bar"))
    return "BAD" if wrong else "ok "


def _bar(row: Row) -> str:
    """Whether a figure met its bar, where it has one."""
    if not row.get("bar"):
        return ""
    reached = row.get("fraction", row.get("gain", 0.0)) >= row["bar"]
    return f" (bar {row['bar']:g}: {'met' if reached else 'MISSED'})"
