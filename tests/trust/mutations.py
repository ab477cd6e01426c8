"""Damage to a folder, drawn by a seed: what disks, copies and attackers do to files.

A mutation says in a few words what it did; the same seed does the same.
"""

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = (-1, 0, 1, 2**31, 2**63, 10**30, 1e308, 0.5)
TEXTS = (
    "",
    "x",
    "x" * 10**5,
    "../../etc/passwd",
    "/etc/passwd",
    "\x1b[2J",
    "CON",
    "a\0b",
    "\u202e",
    "[MASK]",
)
DTYPES = ("F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "NONSENSE")
SHAPES: tuple[list[int], ...] = ([], [0], [1], [2**40, 2**40], [-1, 4], [2**62])

Mutation = Callable[[Path, random.Random], str]


def mutate(folder: Path, seed: int) -> str:
    """Damage one thing in a folder, and return what."""
    rng = random.Random(seed)
    while True:
        mutation = rng.choice(MUTATIONS)
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and path.suffix in _WANTED[mutation]
        )
        if files:
            return f"{mutation.__name__.removeprefix('_')}: {mutation(rng.choice(files), rng)}"


def _flip(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data) or 1)
    if data:
        data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return f"byte {at} of {file.name}"


def _cut(file: Path, rng: random.Random) -> str:
    size = rng.choice((0, 1, 7, 8, rng.randrange(file.stat().st_size + 1)))
    file.write_bytes(file.read_bytes()[:size])
    return f"{file.name} to {size} bytes"


def _grow(file: Path, rng: random.Random) -> str:
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.choice((1, 8, 1000))))
    return file.name


def _overwrite(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    at, size = rng.randrange(len(data) or 1), rng.choice((4, 64, 4096))
    data[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    file.write_bytes(data)
    return f"{size} bytes at {at} of {file.name}"


def _set_nan(file: Path, rng: random.Random) -> str:
    data = bytearray(file.read_bytes())
    at = 4 * rng.randrange(max(1, len(data) // 4))
    data[at : at + 4] = np.array(rng.choice((np.nan, np.inf, -np.inf)), "<f4").tobytes()
    file.write_bytes(data)
    return f"byte {at} of {file.name}"


def _swap(file: Path, rng: random.Random) -> str:
    other = rng.choice(sorted(path for path in file.parent.iterdir() if path.is_file()))
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)
    return f"{file.name} and {other.name}"


def _duplicate(file: Path, rng: random.Random) -> str:
    other = rng.choice(sorted(path for path in file.parent.iterdir() if path.is_file()))
    other.write_bytes(file.read_bytes())
    return f"{file.name} over {other.name}"


def _remove(file: Path, rng: random.Random) -> str:
    file.unlink()
    if rng.random() < 0.3:
        file.mkdir()
        return f"{file.name}, a folder in its place"
    return file.name


def _link(file: Path, rng: random.Random) -> str:
    target = rng.choice(("/dev/zero", "/dev/stdin", "/etc/passwd", file.name, "nowhere", ".."))
    file.unlink()
    file.symlink_to(target)
    return f"{file.name} to {target}"


def _make_fifo(file: Path, _rng: random.Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return file.name


def _make_sparse(file: Path, _rng: random.Random) -> str:
    with file.open("r+b") as stream:
        stream.truncate(1 << 40)
    return f"{file.name} to a terabyte"


def _edit_json(file: Path, rng: random.Random) -> str:
    lines = file.read_text(encoding="utf-8").split("\n") if file.suffix == ".jsonl" else None
    number = rng.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[number] if lines else file.read_text(encoding="utf-8"))
    except ValueError:  # the line after the last
        return f"nothing in {file.name}"
    what = _change_node(value, rng)
    text = json.dumps(value)
    if rng.random() < 0.1:
        text, what = text.replace("{", '{"format_version": 9, ', 1), "a key twice"
    if lines:
        lines[number] = text
        text = "\n".join(lines)
    file.write_text(text, encoding="utf-8")
    return f"{what} in {file.name}"


def _change_node(value: Any, rng: random.Random) -> str:
    """Change one place in a tree of lists and dictionaries."""
    path: list[object] = []
    while True:
        keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path.append(key)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        where = ".".join(map(str, path))[:80]
        if rng.random() < 0.2:
            del value[key]
            return f"{where} removed"
        value[key] = _other_value(value[key], rng)
        return f"{where} changed"


def _other_value(value: Any, rng: random.Random) -> Any:
    deep: Any = 0
    for _ in range(rng.choice((3, 300))):
        deep = [deep]
    near = value + rng.choice((-1, 1)) if isinstance(value, int | float) else [value]
    return rng.choice((None, True, near, near, rng.choice(NUMBERS), rng.choice(TEXTS), [], {}, deep))


def _nest(file: Path, rng: random.Random) -> str:
    depth = rng.choice((1000, 10**5))
    file.write_text("[" * depth + "]" * depth, encoding="utf-8")
    return f"{file.name}, {depth} levels"


def _edit_safetensors(file: Path, rng: random.Random) -> str:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
    except ValueError:
        return "nothing"
    name = rng.choice([key for key in header if key != "__metadata__"] or [""])
    if not name:
        return "nothing"
    tensor = header[name]
    kind = rng.choice(("dtype", "shape", "data_offsets", "name", "length"))
    if kind == "dtype":
        tensor[kind] = rng.choice(DTYPES)
    elif kind == "shape":
        tensor[kind] = rng.choice((*SHAPES, tensor[kind][::-1]))
    elif kind == "data_offsets":
        tensor[kind] = rng.choice(([0, 2**60], [5, 1], [-4, 0], [tensor[kind][0], tensor[kind][1] - 4]))
    elif kind == "name":
        header[rng.choice(("x", "features", "../x"))] = header.pop(name)
    text = json.dumps(header).encode()
    length = rng.choice((2**63, 2**32, 0, 1)) if kind == "length" else len(text)
    file.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
    return f"{kind} of {name} in {file.name}"


def _edit_npz(file: Path, rng: random.Random) -> str:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
    except (OSError, ValueError):
        return "nothing"
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    kinds: dict[str, Callable[[], Any]] = {
        "dtype": lambda: array.astype(rng.choice(("f2", "f8", "i4", "u1", "S3"))),
        "shape": lambda: array[None],
        "empty": lambda: array[:0],
        "NaN": lambda: np.full(array.shape, np.nan, np.float32),
        "pickle": lambda: np.array([{"a": 1}], dtype=object),
        "large": lambda: array * 2**20,
    }
    kind = rng.choice(sorted(kinds))
    arrays[name] = kinds[kind]()
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    file.write_bytes(stream.getvalue())
    return f"{kind} of {name} in {file.name}"


def _add_pickle(file: Path, _rng: random.Random) -> str:
    shutil.copy(file, file.with_suffix(".pkl"))
    return file.with_suffix(".pkl").name


class _Any:
    def __contains__(self, _suffix: object) -> bool:
        return True


_EVERY, _JSON = _Any(), {".json", ".jsonl"}
_WANTED: dict[Mutation, Any] = {
    **dict.fromkeys((_flip, _cut, _grow, _overwrite, _swap, _duplicate, _remove, _link), _EVERY),
    **dict.fromkeys((_make_fifo, _make_sparse, _add_pickle), _EVERY),
    _set_nan: {".safetensors", ".onnx_data"},
    _edit_json: _JSON,
    _nest: {".json"},
    _edit_safetensors: {".safetensors"},
    _edit_npz: {".npz"},
}
_OFTEN = (
    _flip,
    _flip,
    _overwrite,
    _edit_json,
    _edit_json,
    _edit_json,
    _edit_json,
    _edit_safetensors,
    _edit_npz,
    _set_nan,
)
MUTATIONS: tuple[Mutation, ...] = (*_WANTED, *_OFTEN)
