"""Do kernels touch nothing but their arguments, and do nothing that C++ leaves undefined?

The kernels are built anew with address and undefined behaviour sanitizers, whose runtime has to be
in a process before anything else: their tests run in processes of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qpass.runtime import native
from tests.kernels.cases import paths

ROOT = Path(__file__).parents[2]
TESTS = ("test_agreement.py", "test_rows.py", "test_linear.py", "test_attention.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not paths(), reason=str(native.load().why)),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD"),
]


@pytest.fixture(scope="module")
def runtime() -> str:
    """The sanitizer's runtime of the compiler that builds the kernels, to be loaded first."""
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler) or not shutil.which("cmake"):
        pytest.skip("needs a C++ compiler and cmake")
    # exceptions are thrown by a library that has to be there when the runtime looks for it
    found: list[str] = []
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = [compiler, f"-print-file-name={name}"]
        found.append(
            subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        )
    if not all(Path(path).is_file() for path in found):
        pytest.skip("the compiler has no address sanitizer that can be loaded first")
    return " ".join(found)


@pytest.fixture(scope="module")
def folder(runtime: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sanitized library is."""
    build = tmp_path_factory.mktemp("sanitized")
    options = ["-DQPASS_KERNELS=ON", "-DQPASS_SANITIZE=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(build), *options],
        ["cmake", "--build", str(build), "--parallel", str(os.cpu_count())],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build


def run(folder: Path, runtime: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that checks what kernels do."""
    # what Python itself never gives back is no news
    settings = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.sanitized", str(folder), *arguments]
    return subprocess.run(
        command, env={**os.environ, **settings}, cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("test", TESTS)
def test_kernels_stay_in_bounds(folder: Path, runtime: str, test: str) -> None:
    done = run(folder, runtime, str(Path("tests") / "kernels" / test))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
    assert "runtime error" not in done.stderr


@pytest.mark.parametrize("isa", [isa for isa in native.NAMES if native.NAMES[isa] in paths()])
def test_a_read_out_of_bounds_is_noticed(folder: Path, runtime: str, isa: str) -> None:
    done = run(folder, runtime, "--planted", isa)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stdout + done.stderr
    assert "linear_codes" in done.stderr
