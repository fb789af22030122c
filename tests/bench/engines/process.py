"""Other engines' processes: started in their environments, asked in turn, still in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tests.bench.engines.worker import Setting
from tests.peers.environments import WHERE, last_line, on_top
from tests.results import ROOT

# compiling a model counts
LONGEST_ANSWER = 900
# what installs each engine, and environment variables for that
NEEDS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "onnxruntime": (("onnxruntime==1.31.1", "onnxruntime-genai==0.18.0"), {}),
    "openvino": (("openvino==2026.4.1", "nncf==3.4.0", "optimum-intel==2.2.0"), {}),
    "torchao": (("torchao==0.18.0",), {}),
    "llamacpp": (
        ("llama-cpp-python==0.3.36",),
        {
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF "
            f"-DCMAKE_CXX_FLAGS=-include{Path(__file__).with_name('tiles.hpp')}",
        },
    ),
}
# engine -> the module that runs it, where it is another's
MODULES = {"torchao": "by_torch"}


class Failed(Exception):
    """Why an engine cannot be measured, in one line."""


def interpreter(engine: str) -> Path:
    """The Python of an engine's environment, which is made when it is first asked for."""
    if engine not in NEEDS:
        return Path(sys.executable)
    needs, settings = NEEDS[engine]
    try:
        return on_top(engine, needs, settings)
    except subprocess.CalledProcessError as error:
        raise Failed(f"the installation failed: {last_line(error)}") from error


def converted(engine: str, variant: str, model: str, checkpoint: Path) -> Path:
    """Where a model lies in an engine's form, made when it is first asked for."""
    python = interpreter(engine)
    if _module(engine).endswith("by_torch"):
        return checkpoint
    out = WHERE / "models" / model / f"{engine} {variant}"
    # this checkout may have changed since: its own form is made anew
    if out.exists() and engine != "qpass":
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.part")
    _remove(part)
    command = [python, "-m", _module(engine), "convert", variant, checkpoint, part]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT, env=_quiet(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        _remove(part)
        error = subprocess.CalledProcessError(done.returncode, command, stderr=done.stderr)
        raise Failed(f"the conversion failed: {last_line(error)}")
    _remove(out)
    return part.rename(out)


class Process:
    """An engine with a model in memory; it runs only while it is asked something."""

    def __init__(self, engine: str, variant: str, form: Path, setting: Setting) -> None:
        self._log = WHERE / "logs" / f"{engine} {variant}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = [interpreter(engine), "-m", _module(engine), "serve", variant, form]
        with self._log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(word) for word in (*command, *astuple(setting))],
                cwd=ROOT, env={**_quiet(), "OMP_NUM_THREADS": str(setting.threads)},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self.load = float(self._answer()["load"])
        self._signal(signal.SIGSTOP)

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """The process's answer; whatever else it has to do, it does in the meantime."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        found = self._answer()
        self._signal(signal.SIGSTOP)
        return found

    def end(self) -> None:
        """Give back what it holds."""
        self._signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            # what it was asked last may not have been read
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], LONGEST_ANSWER)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # what closed its channel is about to end; what does not answer is not
            self._process.wait(0 if not ready else 10)
        status = self._process.returncode or 0
        self.end()
        errors = self._log.read_text(errors="replace")
        why = last_line(subprocess.CalledProcessError(status, "", stderr=errors))
        raise Failed(why if ready else f"no answer in {LONGEST_ANSWER} s: {why}")

    def _signal(self, what: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(what)


def _module(engine: str) -> str:
    return f"tests.bench.engines.{MODULES.get(engine, f'by_{engine}')}"


def _quiet() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
