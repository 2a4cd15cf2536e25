"""Safe decoding of stored arrays: msgpack maps with arrays inside, npz archives, LZ4 frames. Executes nothing that it
reads.

The published image databases hold msgpack maps whose arrays are maps {nd, type, kind, shape, data}. The package that
wrote them unpickles arrays of objects on reading, which runs code of the file's author; this decoder accepts only plain
numbers.
"""

from __future__ import annotations

import io
import lzma
import math
import re
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import lz4.frame
import msgpack
import numpy as np
from numpy.lib import format as npy

NUMERIC_TYPE = re.compile(r"[<>|=]?[fiub]\d{1,2}")
TEXT_LIMIT = 1 << 26
NPZ_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    tokenize.TokenError,
    EOFError,
    OSError,
    OverflowError,
    KeyError,
    RuntimeError,
)


def numeric_dtype(name: Any) -> np.dtype:
    """The numpy type of a stored type code such as "<f2".

    Raises:
        ValueError: not a code of plain numbers.
    """
    text = name.decode("ascii") if isinstance(name, bytes) else name
    if not isinstance(text, str) or not NUMERIC_TYPE.fullmatch(text):
        raise ValueError(f"array of type {name!r} refused: only plain numbers are read, never Python objects")
    try:
        return np.dtype(text)
    except TypeError as error:
        raise ValueError(f"array of type {name!r} refused: no such type of numbers") from error


def _decode_array(item: dict[Any, Any]) -> Any:
    """msgpack object hook: turns an array map into an array, leaves any other map alone."""
    fields = {key.decode("ascii") if isinstance(key, bytes) else key: value for key, value in item.items()}
    if "nd" not in fields:
        return item
    kind = fields.get("kind", b"")
    if kind not in (b"", ""):
        raise ValueError(f"array of kind {kind!r} refused: only plain numbers are read, never Python objects")
    dtype = numeric_dtype(fields.get("type"))
    data = fields.get("data")
    if not isinstance(data, bytes):
        raise ValueError(f"array data: expected bytes, got {type(data).__name__}")
    flat = np.frombuffer(data, dtype=dtype)
    if fields["nd"] is not True:
        return flat.reshape(())[()]
    shape = fields.get("shape")
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise ValueError(f"array shape: expected a list of sizes, got {shape!r}")
    return flat.reshape(shape)


def _encode_array(value: Any) -> Any:
    """msgpack default: the inverse of `_decode_array`."""
    if isinstance(value, (np.ndarray, np.generic)):
        dtype = numeric_dtype(value.dtype.str)
        if isinstance(value, np.ndarray):
            data = np.ascontiguousarray(value).tobytes()
            return {b"nd": True, b"type": dtype.str, b"kind": b"", b"shape": list(value.shape), b"data": data}
        return {b"nd": False, b"type": dtype.str, b"data": value.tobytes()}
    raise TypeError(f"cannot be stored: {type(value).__name__}")


def pack_arrays(record: dict[str, Any]) -> bytes:
    """A map of arrays and plain values as msgpack, in the published layout.

    Raises:
        TypeError: a value is neither plain nor an array of numbers.
    """
    return msgpack.packb(record, default=_encode_array, use_bin_type=True)


def unpack_arrays(data: bytes) -> dict[str, Any]:
    """The inverse of `pack_arrays`; arrays are read-only views of `data`.

    Raises:
        ValueError: not a msgpack map with string keys, damaged, or with anything but plain numbers in an array.
    """
    try:
        record = msgpack.unpackb(data, object_hook=_decode_array, raw=False)
    except (msgpack.UnpackException, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise ValueError(f"damaged msgpack record ({str(error) or type(error).__name__})") from error
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        raise ValueError(f"expected a msgpack map with string keys, got {type(record).__name__}")
    return record


def pack_npz(record: dict[str, Any]) -> bytes:
    """A map of arrays as a compressed npz archive."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **record)
    return buffer.getvalue()


def _npy_dtype(stream: IO[bytes], size: int) -> np.dtype:
    """Type of the array in an open npy member of `size` bytes, from its header alone; the numbers must fit into it."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version} is not supported")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if not dtype.hasobject:
        numeric_dtype(dtype.str)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"damaged npz archive (an array of {list(shape)} {dtype} in {size} bytes)")
    return dtype


def unpack_npz(source: bytes | str | Path, skip_objects: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an npz archive.

    Args:
        source: the archive, as bytes or as a path.
        skip_objects: leave arrays of Python objects out instead of raising. They are never unpickled.

    Raises:
        ValueError: not a whole npz archive, an array is damaged, or it holds Python objects and they are not skipped.
        FileNotFoundError: the path does not exist.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                with archive.open(member) as stream:
                    holds_objects = _npy_dtype(stream, archive.getinfo(member).file_size).hasobject
                if not holds_objects:
                    with archive.open(member) as stream:
                        arrays[name] = npy.read_array(stream, allow_pickle=False)
                elif not skip_objects:
                    raise ValueError(f"array {name!r} holds Python objects: refused, only plain numbers are read")
    except FileNotFoundError:
        raise
    except NPZ_ERRORS as error:
        raise ValueError(f"damaged npz archive ({str(error) or type(error).__name__})") from error
    return arrays


def pack_text(record: dict[str, Any]) -> bytes:
    """A caption record as the published LZ4 frame around a msgpack map."""
    return lz4.frame.compress(msgpack.packb(record, use_bin_type=True))


def unpack_text(data: bytes) -> dict[str, Any]:
    """The inverse of `pack_text`.

    Raises:
        ValueError: not a whole LZ4 frame, or not a msgpack map with string keys inside.
    """
    frame = lz4.frame.LZ4FrameDecompressor()
    try:
        content = frame.decompress(data, max_length=TEXT_LIMIT)
    except RuntimeError as error:
        raise ValueError(f"damaged LZ4 frame ({error})") from error
    if not frame.eof:
        raise ValueError("damaged LZ4 frame (it does not end)")
    return unpack_arrays(content)
