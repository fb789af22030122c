"""How tensors become safetensors files: one after the other, so that few exist at the same time.

Packed weights, which kernels read where the file is mapped, come first in a file and begin at
multiples of their lines. Its metadata then says how their codes lie, for whoever reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qpass.errors import BadInput
from qpass.ops.packing import LINE

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# what files start with is filled up to a multiple of so many bytes
ALIGNED = 8
# types in the order in which a file has them, the widest first, and what it calls them
TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# of tensors that are called lines
DRAWING = (
    "codes of a weight, uint8 [blocks of 16 rows, lines, 64]; each group of columns is padded to "
    "whole lines. 8 bit: byte 4n+j of a line is row n, column j of 4, plus 128. 4 bit: byte 4n+j "
    "is row n, column j of 8 in the low half and j+4 in the high half, plus 8 where there are no "
    "offsets. Scales and offsets of groups are float16 [blocks, groups, 16]"
)
_RANK = {dtype: rank for rank, dtype in enumerate(TYPES)}

# the tensor of a name, and those that come of the same work, by theirs
Make = Callable[[str], Mapping[str, Tensor]]


def write_shards(where: Path, tensors: Mapping[str, Tensor], shard_bytes: int, make: Make) -> None:
    """Write tensors to the directory `where`, in files of at most `shard_bytes` if they fit.

    A tensor on the meta device only says what it is like: `make` is asked for it when its turn is.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(tensors):
        nbytes = tensors[name].nbytes
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    if len(shards) == 1:
        _write(where / WEIGHTS, tensors, shards[0], make)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write(where / file, tensors, names, make)
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    (where / INDEX).write_text(text + "\n", encoding="utf-8")


def _write(file: Path, tensors: Mapping[str, Tensor], names: Sequence[str], make: Make) -> None:
    # every tensor is aligned where lines come first, and then the wider types
    lines = {name for name in names if _in_lines(tensors[name])}
    ordered = sorted(names, key=lambda n: (n not in lines, _rank(n, tensors[n]), n))
    metadata = {"format": "pt", "lines": DRAWING} if lines else {"format": "pt"}
    header: dict[str, object] = {"__metadata__": metadata}
    starts: dict[str, int] = {}
    end = 0
    for name in ordered:
        tensor, starts[name] = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(ALIGNED + len(text)) % (LINE if lines else ALIGNED))
    first = ALIGNED + len(text)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(first + end)
        while starts:
            name = next(iter(starts))
            here = tensors[name]
            found = make(name) if here.is_meta else {name: here}
            for each in found.keys() & starts.keys():
                _put(out, first + starts.pop(each), found[each], tensors[each])


def _put(out: BinaryIO, at: int, tensor: Tensor, like: Tensor) -> None:
    assert (tensor.dtype, tensor.shape) == (like.dtype, like.shape)
    if tensor.numel():
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        out.seek(at)
        out.write(plain.numpy().data)


def _in_lines(tensor: Tensor) -> bool:
    """Whether this may be a packed weight; whole lines of it keep what comes next aligned."""
    return tensor.dtype is torch.uint8 and tensor.dim() == 3 and tensor.shape[2] == LINE


def _rank(name: str, tensor: Tensor) -> int:
    if tensor.dtype not in _RANK:
        raise BadInput(
            f"{name}: safetensors files hold no {tensor.dtype}; store it in another type"
        )
    return _RANK[tensor.dtype]
