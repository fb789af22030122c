"""Environments of their own for other tools, under `.data/peers`, made when first asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.results import ROOT

WHERE = ROOT / ".data" / "peers"


def alone(name: str, needs: Sequence[str]) -> Path:
    """The interpreter of an environment that shares nothing; the same torch as here goes first."""
    version = torch.__version__.partition("+")[0]
    steps = [[f"torch=={version}", "setuptools", "wheel"], [f"torch=={version}", *needs]]
    return _made(WHERE / name, steps, None, {})


def on_top(name: str, needs: Sequence[str], settings: Mapping[str, str] | None = None) -> Path:
    """The interpreter of an environment that finds here what it lacks, so torch comes once.

    `settings` are environment variables for the installation.
    """
    here = sysconfig.get_path("purelib")
    return _made(WHERE / name, [list(needs)], here, settings or {})


def last_line(error: subprocess.CalledProcessError) -> str:
    """Why a command failed, in one line."""
    if error.returncode < 0:
        hint = ", which memory that does not suffice ends in" if error.returncode == -9 else ""
        return f"ended by signal {-error.returncode}{hint}"
    lines = [line.strip() for line in (error.stderr or "").splitlines()]
    told = [
        line for line in lines if line and not line.startswith(("[notice]", "hint:", "╰", "note:"))
    ]
    return told[-1] if told else f"exit status {error.returncode}"


def _made(
    where: Path, steps: list[list[str]], below: str | None, settings: Mapping[str, str]
) -> Path:
    python, done = where / "bin" / "python", where / "installed"
    if not done.exists():
        where.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", where], check=True)
    if below is not None:
        site = next(where.glob("lib/python*/site-packages"))
        # `addsitedir`, so that the `.pth` files there count too; the other may have moved since
        (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    if done.exists():
        return python
    for needs in steps:
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", *needs],
            check=True, env={**os.environ, **settings}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    done.touch()
    return python
