"""Safetensors files larger than memory: read piece by piece, and written in place, one tensor at a time.

The library reads and writes whole files. Merging opens many at once and holds one group of layers of each; so this
maps a file and lets go of its pages again, and lays a file out before the first tensor is computed. The format is
public: a length of 8 bytes, a JSON header, and the data of all tensors end to end.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import AdapterFileError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LFS_POINTER = b"version https://git-lfs"  # what a clone without LFS has in place of a large file
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Stored(TypedDict):
    """What a header says of a tensor."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]  # where its bytes begin and end, behind the header


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by key, on the CPU, memory-mapped: they stay on disk until they are used.

    They stay readable when the file is replaced or deleted. Nothing must write to them. A file that is damaged or
    truncated is a `SafetensorError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened_and_checked(path) as file:
            self.metadata: dict[str, str]
            self._header, self._start, self.metadata = _read_header(file)
            for key in self._header:
                _check_extent(key, self.shape(key))
            # Private, so that torch may take it for writable memory; its pages are the file's while nobody writes.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def __len__(self) -> int:
        return len(self._header)

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __contains__(self, key: object) -> bool:
        return key in self._header

    def __getitem__(self, key: str) -> Tensor:
        about = self._header[key]
        dtype, shape = self.dtype(key), self.shape(key)
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(
            self._map, dtype=dtype, count=math.prod(shape), offset=self._start + about["data_offsets"][0]
        )
        return flat.reshape(shape)

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._header[key]["shape"])

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor, without reading it; a `TypeError` if it is one that nothing here uses."""
        name = self._header[key]["dtype"]
        if name not in _DTYPES:
            raise TypeError(f"tensor '{key}' has the unknown dtype {name}")
        return _DTYPES[name]

    def piece(self, key: str, size: int) -> bytes:
        """At most this many bytes from the middle of a tensor, without mapping what lies around them."""
        begin, end = self._header[key]["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self._start + max(begin, (begin + end - size) // 2))
            return file.read(min(size, end - begin))

    def release(self) -> None:
        """Give the memory of what was read so far back to the system; using a tensor again reads it again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def open_tensors(path: Path, error: type[AdapterFileError]) -> TensorFile:
    """A file of an adapter, or an error of this class if it is damaged."""
    try:
        return TensorFile(path)
    except SafetensorError as damage:
        raise error(f"{path} is damaged or truncated ({damage}).") from None


class TensorFileWriter(contextlib.ExitStack):
    """Fills in a safetensors file that `lay_out` made, one tensor at a time, in any order; to be used by `with`.

    Several processes may write different tensors at once.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        with open(path, "rb") as file:  # of its own: read-ahead in the other would be written back over other writers'
            self._header, self._start, _ = _read_header(file)
        self._file = self.enter_context(open(path, "r+b"))  # noqa: SIM115  (closed as the stack is)

    def write(self, key: str, tensor: Tensor) -> None:
        """Put one tensor in its place; a `ValueError` if its shape or dtype is not the announced one."""
        about = self._header[key]
        if _NAMES.get(tensor.dtype) != about["dtype"] or list(tensor.shape) != about["shape"]:
            raise ValueError(
                f"tensor '{key}' is {tensor.dtype} of shape {tuple(tensor.shape)}, but {about['dtype']} of shape "
                f"{tuple(about['shape'])} was announced."
            )
        if tensor.numel() == 0:
            return
        self._file.seek(self._start + about["data_offsets"][0])
        self._file.write(bytes_of(tensor))


def _check_extent(key: str, shape: tuple[int, ...]) -> None:
    """The library checks that the data of a tensor is there; an empty one has none, and may have any shape."""
    if math.prod(shape) == 0 and 8 * math.prod(size for size in shape if size) >= 2**63:
        raise SafetensorError(f"tensor '{key}' is empty, but of the impossible shape {shape}")


def _opened_and_checked(path: Path) -> BinaryIO:
    """The file, after the library has checked its header, offsets and length; the very same one, if it is replaced."""
    while True:
        file = open(path, "rb")  # noqa: SIM115  (closed by the caller)
        try:
            with safe_open(path, framework="np"):  # which opens it once, other than for torch
                pass
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BaseException as error:
            with file:
                if isinstance(error, SafetensorError) and file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    raise SafetensorError("it is a pointer of Git LFS: run `git lfs pull` in its folder") from None
            raise
        file.close()


def _read_header(file: BinaryIO) -> tuple[dict[str, _Stored], int, dict[str, str]]:
    """What is stored by key, where the data begins, and the metadata."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    return header, 8 + length, metadata


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the CPU as safetensors stores it."""
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]


def lay_out(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the header of a safetensors file of these dtypes and shapes, and give the file its full length.

    All tensors read as zero. A file that is there is replaced.
    """
    stored: dict[str, _Stored] = {}
    position = 0
    # As the library does: wide dtypes first, so that every tensor is aligned, then by key.
    for key in sorted(tensors, key=lambda key: (-tensors[key][0].itemsize, key)):
        dtype, shape = tensors[key]
        end = position + dtype.itemsize * math.prod(shape)
        stored[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = _header_text(metadata or {}, stored)
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def set_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Put other metadata, no longer ones, in the place of a safetensors file's; spaces fill the header up."""
    with open(path, "r+b") as file:
        stored, start, _ = _read_header(file)
        text = _header_text(metadata, stored)
        if len(text) > start - 8:
            raise ValueError(f"{len(text)} bytes of metadata do not fit into {path}.")
        file.seek(8)
        file.write(text.ljust(start - 8))


def _header_text(metadata: Mapping[str, str], stored: Mapping[str, _Stored]) -> bytes:
    first = {"__metadata__": dict(metadata)} if metadata else {}
    return json.dumps({**first, **stored}, separators=(",", ":"), ensure_ascii=False).encode()
