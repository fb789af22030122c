"""`qpass doctor`: what does this machine offer, and which kernels will run?"""

from __future__ import annotations

import importlib.metadata
import platform

from qpass.cli.output import AsJson, emit

# what qpass can use when it is there: distribution -> what for
_OPTIONAL = {
    "transformers": "models, caches, checkpoints",
    "onnx": "ONNX export",
    "onnxscript": "ONNX export",
    "onnxruntime": "running exported files",
    "triton": "GPU kernels",
}


def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what the processor can do, and whether kernels are compiled."""
    import torch

    from qpass.report import Table
    from qpass.runtime import gpu, native
    from qpass.runtime.device import this_device

    device = this_device()
    kernels = native.load().text()
    packages = {name: _version(name) for name in ("qpass", *_OPTIONAL)}
    facts = {
        "python": platform.python_version(),
        "torch": device.torch,
        "accelerator": _accelerator(torch.version.cuda, torch.version.hip),
        "system": f"{device.system} {device.machine}",
        "threads": device.threads,
        "vector instructions": device.vector,
        "kernels": kernels,
        "GPU kernels": gpu.state(),
    }
    if as_json:
        result = {**facts, "device": device, "compiled": device.compiled, "packages": packages}
        emit(result, as_json=True)
        return
    rows = tuple(
        (name, version or f"absent ({_OPTIONAL.get(name, 'itself')})")
        for name, version in packages.items()
    )
    emit({"machine": Table("", ("fact", "value"), (*facts.items(), *rows))}, as_json=False)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _accelerator(cuda: str | None, hip: str | None) -> str | None:
    if cuda is not None:
        return f"torch is built for CUDA {cuda}"
    return None if hip is None else f"torch is built for ROCm {hip}"
