"""Named tensors as one file in the layout of safetensors, block by block: nothing is ever copied together.

    8 bytes     length n of the header, little-endian
    n bytes     JSON {name: {dtype, shape, data_offsets}}, filled up with spaces
    …           the tensors' bytes one after the other, wide types first, so that all of them are aligned

The safetensors library reads these files. Its own writer holds the interpreter and several copies of all tensors; a state
is written while the next step computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

BLOCK = 8 << 20  # bytes

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_ALIGNED = 8  # bytes; the widest type


def blocks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file, at most `BLOCK` at a time; views of the tensors where those are contiguous and on the CPU."""
    names = _ordered(tensors)
    yield memoryview(_header(tensors, names))
    for name in names:
        content = _bytes(tensors[name])
        for start in range(0, len(content), BLOCK):
            yield content[start : start + BLOCK]


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file."""
    return len(_header(tensors, _ordered(tensors))) + sum(tensor.nbytes for tensor in tensors.values())


def unpack(content: Tensor) -> dict[str, Tensor]:
    """The tensors of a file's bytes (N,) uint8, as views of them; ValueError where it is no such file."""
    try:
        start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
        header = json.loads(content[8:start].numpy().tobytes())
        return {name: _tensor(content[start:], entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"no file of tensors: {type(error).__name__}: {error}") from error


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor], names: list[str]) -> bytes:
    entries, start = {}, 0
    for name in names:
        tensor = tensors[name]
        stop = start + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes; a copy of this one where it must be moved or put in order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tensor(data: Tensor, entry: Mapping) -> Tensor:
    dtype, (start, stop) = _TYPES[entry["dtype"]], entry["data_offsets"]
    piece = data[start:stop]
    if piece.storage_offset() % dtype.itemsize:  # another writer's order
        piece = piece.clone()
    return piece.view(dtype).view(entry["shape"])
