"""Does qpass install and run where nothing can be compiled?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_COMPILER = {"CXX": str(ROOT / "no" / "such" / "compiler")}


def build(folder: Path, *settings: str, **environment: str) -> tuple[int, str]:
    """Build a wheel of the checkout into `folder`, in a tree of its own: exit code and output."""
    settings = (f"build-dir={folder / 'build'}", *settings)
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v")
    options = [f"--config-settings={setting}" for setting in settings]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), *options, str(ROOT)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    # CMake wraps its messages
    return done.returncode, " ".join(done.stdout.split())


def python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with the unpacked wheel `site`, outside the checkout."""
    # without the hook of an editable install, which would win over any path
    paths = (str(site), *(path for path in sys.path if path and Path(path) != ROOT))
    return subprocess.run(
        [sys.executable, "-P", "-S", "-c", code],
        cwd=site,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


# how an installation comes to have no kernels -> settings, environment, what the build says of it
WITHOUT = {
    "no compiler": ((), NO_COMPILER, "there is no working C++ compiler"),
    "by request": (("cmake.define.QPASS_KERNELS=OFF",), {}, "no compiled kernels, by request"),
}


@pytest.fixture(scope="module", params=WITHOUT)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built without kernels, unpacked."""
    settings, environment, says = WITHOUT[request.param]
    folder = tmp_path_factory.mktemp("wheel")
    code, output = build(folder, *settings, **environment)
    assert code == 0, output
    assert "no compiled kernels" in output
    assert says in output
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_a_wheel_holds_what_a_checkout_holds(site: Path) -> None:
    def files(root: Path, *endings: str) -> set[str]:
        return {p.relative_to(root).as_posix() for e in endings for p in root.rglob(f"*{e}")}

    shipped = (".py", ".toml", ".html")
    assert files(site / "qpass", *shipped) >= files(ROOT / "qpass", *shipped)
    gpu = ROOT / "kernels" / "gpu"
    assert files(site / "qpass" / "_kernels" / "gpu", ".py") == files(gpu, ".py")
    assert not files(site, ".so", ".cpp")
    (metadata,) = site.glob("*.dist-info")
    entries = (metadata / "entry_points.txt").read_text()
    assert "qpass = qpass.backend:backend" in entries
    assert "qpass = qpass.cli.main:main" in entries


def test_doctor_says_that_the_kernels_are_absent(site: Path) -> None:
    code = "import sys; from qpass.cli.main import run; sys.exit(run(['doctor', '--json']))"
    done = python(site, code)
    assert done.returncode == 0, done.stderr
    facts: Mapping[str, object] = json.loads(done.stdout)
    assert facts["compiled"] is False
    assert "no compiled kernels, operators run on plain PyTorch" in str(facts["kernels"])
    assert python(site, code.replace(", '--json'", "")).stdout.count("no compiled kernels") == 1


def test_operators_run_without_kernels(site: Path) -> None:
    code = (
        "import pathlib, torch, qpass.ops\n"
        "from qpass.runtime import native\n"
        "assert pathlib.Path(qpass.ops.__file__).is_relative_to(pathlib.Path.cwd())\n"
        "assert native.load().path is None\n"
        "x, signs, one = torch.randn(3, 16), torch.ones(16), torch.ones(1, 1)\n"
        "y = qpass.ops.hadamard(qpass.ops.hadamard(x, signs, one, 16), signs, one, 16)\n"
        "torch.testing.assert_close(y, x)\n"
    )
    done = python(site, code)
    assert done.returncode == 0, done.stderr


def test_kernels_asked_for_and_no_compiler_is_an_error(tmp_path: Path) -> None:
    code, output = build(tmp_path, "cmake.define.QPASS_KERNELS=ON", **NO_COMPILER)
    assert code != 0
    assert "QPASS_KERNELS is ON, but there is no working C++ compiler" in output
