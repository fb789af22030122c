"""What the sanitizer test runs in a process of its own, with kernels that check what they touch.

`python -m tests.kernels.sanitized FOLDER TESTS...` runs tests with the library of a folder;
`python -m tests.kernels.sanitized FOLDER --planted NAME` reads behind the end of a weight.
"""

from __future__ import annotations

import sys

import pytest
import torch

import qpass._kernels
import qpass.ops as ops
from qpass.runtime import native
from tests.kernels.cases import random_packed


def planted(name: str) -> None:
    """A product with a weight whose memory ends before its shape does."""
    packed = random_packed(32, 64, 1, (8, False, False), torch.Generator().manual_seed(0))
    storage = packed.weight.untyped_storage()
    storage.resize_(storage.nbytes() - 64)
    codes, scales = torch.ones(20, 64, dtype=torch.int8), torch.ones(20, 1)
    with native.capped(native.NAMES[name]):
        ops.linear_codes(codes, scales, packed, None, torch.float32)


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    qpass._kernels.__path__.insert(0, folder)
    found = native.load()
    assert found.why is None, found
    assert str(found.path).startswith(folder), found
    if rest[0] == "--planted":
        planted(rest[1])
    else:
        sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *rest]))
