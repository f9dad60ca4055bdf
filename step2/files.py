"""Files that are whole or not there, and a results folder that one notebook uses at a time. Uses filelock."""

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from step2.variants import require


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name first, so that it's there whole or not at all.

    OSError that says so where the disk is full; what was not finished is removed.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    except (OSError, RuntimeError) as err:  # torch's writer raises RuntimeError where the disk is full
        needed = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free - needed
        if getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or free < (1 << 20):
            text = f"the disk is full, {path} could not be written: free some space there and run again"
            raise OSError(errno.ENOSPC, text) from err
        raise


def write_json(path: Path, content: dict) -> None:
    """Write a dict as JSON with its own check sum, atomically."""
    sealed = {"sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    text = json.dumps(content | sealed, indent=2)
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, atomically, the same bytes for the same numbers."""
    write_atomically(path, lambda p: table.to_csv(p, index=False, float_format="%.9g", lineterminator="\n"))


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the dict that write_json wrote, None where it is missing, damaged or changed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return content if seal == hashlib.sha256(json.dumps(content).encode()).hexdigest() else None


def write_sealed(path: Path, content: bytes) -> None:
    """Write bytes behind their SHA-256, atomically."""
    write_atomically(path, lambda p: p.write_bytes(hashlib.sha256(content).digest() + content))


def read_sealed(path: Path) -> bytes | None:
    """Return the bytes that write_sealed wrote, None where the file is missing, damaged or changed."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    return whole[32:] if hashlib.sha256(whole[32:]).digest() == whole[:32] else None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_results(results: Path) -> FileLock:
    """Make the results folder and take its lock, which ends with this process; ValueError where that fails.

    Two notebooks would train the same runs twice and mix their tables. Leftovers of a killed one are removed.
    """
    wrong = f"results = {str(results)!r} can't be written to: set results to another folder"
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock = FileLock(results / ".lock", timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout as err:
        owner = read_json(results / ".owner.json") or {}
        who = "process {pid} on {host}, since {since}".format(
            **{"pid": "?", "host": "?", "since": "?"} | owner
        )
        advice = "wait for it, shut its kernel down, or set results to another folder"
        raise RuntimeError(f"another notebook uses {results} ({who}): {advice}") from err
    except OSError as err:
        raise ValueError(f"{wrong} ({err.strerror or err})") from err
    for left_behind in [*results.glob(".*.tmp"), *results.glob("runs/*/*/.*.tmp")]:
        left_behind.unlink(missing_ok=True)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(results / ".owner.json", {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    return lock


def put_aside(results: Path, identity: str) -> Path | None:
    """Move the tables and figures of another comparison to a dated folder and return it.

    identity: of the present comparison. What this one writes again stays until then.
    """
    known = read_json(results / "written.json") or {}
    write_json(results / "written.json", {"comparison": identity, "files": known.get("files", [])})
    if not known or known.get("comparison") == identity:
        return None
    files = known.get("files", [])
    require(isinstance(files, list), f"{results / 'written.json'} is damaged: delete it and run again")
    there = [p for p in (results / Path(str(name)).name for name in files) if p.is_file()]
    earlier = results / time.strftime("earlier-%Y-%m-%d-%H%M%S")
    for path in there:
        earlier.mkdir(exist_ok=True)
        path.replace(earlier / path.name)
    write_json(results / "written.json", {"comparison": identity, "files": []})
    return earlier if there else None


def note_written(results: Path, name: str) -> None:
    """Remember that this comparison wrote a file of the results folder."""
    known = read_json(results / "written.json") or {"comparison": "", "files": []}
    if name not in known["files"]:
        write_json(results / "written.json", known | {"files": [*known["files"], name]})
