"""Files that are whole or not there, and a results folder that one notebook uses at a time. Uses filelock."""

import errno
import hashlib
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from Step1_Image_Preprocessing import put_in_place

TABLES, TEXTS = (".csv", ".png", ".svg"), ("settings.json", "summary.md")  # what a comparison writes


def write_content(path: Path, *parts: bytes) -> None:
    """Write bytes, one part after another, under another name first: a file is there whole or not at all.

    OSError that says so where the disk is full, or another program has the file; what was not finished is removed.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
        put_in_place(temporary, path)
    except PermissionError as err:  # on Windows also where Excel shows the file
        text = f"{path} could not be written: close it in other programs, or check the permissions, and run again"
        raise PermissionError(err.errno, text) from err
    except OSError as err:
        if err.errno not in (errno.ENOSPC, errno.EDQUOT):
            text = f"{path} could not be written ({err.strerror}): folder gone, or path too long? Mend it and run again"
            raise OSError(err.errno, text) from err
        full = "the disk is full" if err.errno == errno.ENOSPC else "your disk quota is used up"
        needs = f"it needs {sum(map(len, parts)):,} bytes"
        text = f"{full}, {path} could not be written ({needs}): free some space there and run again"
        raise OSError(errno.ENOSPC, text) from err
    finally:
        with suppress(OSError):  # of a disk that can't be written to any more
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write a dict as JSON with a check sum of its file name and itself, atomically."""
    text = json.dumps(content | {"sha256": json_seal(path, content)}, indent=2)
    write_content(path, text.encode())


def json_seal(path: Path, content: dict) -> str:
    """Return the check sum that belongs into a JSON file of this name."""
    return hashlib.sha256(json.dumps([path.name, content]).encode()).hexdigest()


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table as CSV, atomically, the same bytes for the same numbers."""
    write_content(path, table.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the dict that write_json wrote to this file, None where it is missing, damaged or another's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seal = content.pop("sha256")
    except (FileNotFoundError, ValueError, AttributeError, KeyError, TypeError):
        return None
    return content if seal == json_seal(path, content) else None


def write_sealed(path: Path, content: bytes) -> None:
    """Write bytes behind a check sum of folder, file name and themselves, atomically."""
    write_content(path, seal(path, content), content)


def read_sealed(path: Path) -> bytes | None:
    """Return the bytes that write_sealed wrote here, None where the file is missing, damaged or another's."""
    try:
        whole = path.read_bytes()
    except FileNotFoundError:
        return None
    sealed, content = whole[:32], whole[32:]
    return content if seal(path, content) == sealed else None


def seal(path: Path, content: bytes) -> bytes:
    """Return the check sum that stands before the content of this file, 32 bytes."""
    check_sum = hashlib.sha256(f"{path.parent.name}/{path.name}\0".encode())
    check_sum.update(content)  # a B7's checkpoint is 0.8 GB: no copy
    return check_sum.digest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lock_results(results: Path) -> FileLock:
    """Make the results folder and take its lock, which ends with this process; ValueError where that fails,
    RuntimeError where another notebook has it.

    Two notebooks would train the same runs twice and mix their tables. Leftovers of a killed one are removed.
    """
    wrong = f"results = {str(results)!r} can't be written to: set results to another folder"
    try:
        results.mkdir(parents=True, exist_ok=True)
        lock = FileLock(results / ".lock", timeout=0, is_singleton=True)
        lock.release(force=True)  # where a notebook comes here again, of a folder that was removed meanwhile
        lock.acquire()
    except Timeout as err:
        owner = {"pid": "?", "host": "?", "since": "?"} | (read_json(results / ".owner.json") or {})
        who = "process {pid} on {host}, since {since}".format(**owner)
        advice = "wait for it, shut its kernel down, or set results to another folder"
        raise RuntimeError(f"another notebook uses {results} ({who}): {advice}") from err
    except NotImplementedError as err:  # of filelock
        raise ValueError(f"{wrong} (this file system has no locks)") from err
    except OSError as err:
        raise ValueError(f"{wrong} ({err.strerror or err})") from err
    leftovers = ".*.*.*[0-9].tmp"  # as write_content names them, which ends with a process's number
    for left_behind in [*results.glob(leftovers), *results.glob(f"runs/*/*/{leftovers}")]:
        left_behind.unlink(missing_ok=True)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    write_json(results / ".owner.json", {"pid": os.getpid(), "host": socket.gethostname(), "since": since})
    return lock


def put_aside(results: Path, identity: str) -> tuple[Path | None, list[str]]:
    """Move the tables and figures of another comparison to a dated folder.

    identity: of the present comparison. Returns that folder, None where nothing was moved, and the names of
    the files that this comparison wrote earlier: they stay until they are written again.
    """
    path = results / "written.json"
    known = read_json(path) or {}
    if known.get("comparison") == identity:
        return None, known["files"]
    names = known.get("files", [])
    if not known and (path.exists() or (results / "runs").is_dir()):  # who wrote them is unknown: all
        names = [p.name for p in results.iterdir() if p.suffix in TABLES or p.name in TEXTS]
    there = [results / name for name in names if (results / name).is_file()]
    earlier = results / time.strftime("earlier-%Y-%m-%d-%H%M%S")
    for file in there:
        earlier.mkdir(exist_ok=True)
        try:
            put_in_place(file, earlier / file.name)
        except PermissionError as err:
            text = f"{file} could not be moved to {earlier}: close it in other programs, and run again"
            raise PermissionError(err.errno, text) from err
    write_json(path, {"comparison": identity, "files": []})
    return (earlier if there else None), []
