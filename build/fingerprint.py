"""What an artefact was made from: content hashes of the checkpoint and of the code."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

__all__ = ["checkpoint_hash", "file_hashes", "key_of", "source_digest"]

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")
_CHUNK_BYTES = 16 * 2**20


def file_hashes(
    directory: Path, known: dict[str, dict[str, Any]], *, progress: bool = True
) -> dict[str, dict[str, Any]]:
    """File name -> {"sha256", "bytes", "mtime_ns"} of every checkpoint file.

    `known` holds earlier results: a file of the same size and time is not read again.
    """
    paths = sorted({path for pattern in _PATTERNS for path in directory.glob(pattern)})
    sizes = {path: path.stat() for path in paths}
    hashes: dict[str, dict[str, Any]] = {}
    unread = [
        path
        for path in paths
        if not _is_known(known.get(path.name), sizes[path].st_size, sizes[path].st_mtime_ns)
    ]
    total = sum(sizes[path].st_size for path in unread)
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="hashing the checkpoint",
        disable=None if progress and total > 2**30 else True,
    ) as bar:
        for path in paths:
            if path not in unread:
                hashes[path.name] = known[path.name]
                continue
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
            hashes[path.name] = {
                "sha256": digest.hexdigest(),
                "bytes": sizes[path].st_size,
                "mtime_ns": sizes[path].st_mtime_ns,
            }
    return hashes


def checkpoint_hash(hashes: dict[str, dict[str, Any]]) -> str:
    """One hash of all files that `file_hashes` read, whatever their times."""
    return key_of([(name, hashes[name]["sha256"]) for name in sorted(hashes)])


def key_of(*parts: object) -> str:
    """One hash over anything with a stable repr."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    return digest.hexdigest()


def source_digest(files: Iterable[Path]) -> str:
    """Hash of source files: an artefact made by other code is out of date."""
    return key_of(*(path.read_bytes() for path in sorted(files)))


def _is_known(entry: dict[str, Any] | None, size: int, mtime_ns: int) -> bool:
    return entry is not None and entry["bytes"] == size and entry["mtime_ns"] == mtime_ns
