"""Files that appear whole or not at all, and locks that die with their process."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from store.errors import StoreError

TMP_MARK = ".tmp-"
"""Prefix of the name of every half-written file; no reader opens such a file."""

WRITE_LOCK = ".write.lock"
INDEX_LOCK = ".index.lock"
MANIFEST_LOCK = ".manifest.lock"


def shard_lock(shard: str) -> str:
    """Returns the name of the lock that excludes a second writer of the shard."""
    return f".shard-{shard}.lock"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that is renamed to `path`, durable, when the block ends, or never; makes its directory.

    Raises StoreError when the disk is full or the directory may not be written.
    """
    tmp = path.with_name(f"{TMP_MARK}{secrets.token_hex(4)}-{path.name}")
    try:
        with disk_errors_named(path):
            make_directory(path.parent)
            with tmp.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            tmp.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turns an OSError of a full, read-only or failing disk into a StoreError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(directory: Path, *, named: str) -> None:
    """Raises StoreError where a directory may not be written or made; `named`: what it is, for the error."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(f"cannot write to {named} at {directory}: no permission to write in {existing}")


def make_directory(directory: Path) -> None:
    """Makes a directory and those above it, durable. Raises OSError."""
    if not directory.is_dir():
        if directory.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory))
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync(directory.parent)


def sync(path: Path) -> None:
    """Makes a file's content durable, or a directory's names: otherwise a power cut may lose a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_orphans(root: Path) -> None:
    """Removes half-written files of killed writers below `root`; requires the write lock. Raises OSError."""
    for orphan in root.rglob(f"{TMP_MARK}*"):
        orphan.unlink(missing_ok=True)


class FileLock:
    """A lock on a file, by flock: the kernel releases it when the process ends, however it ends.

    `shared`: any number of processes may have it, but none exclusively meanwhile. Forked children (e.g.
    workers of the verifier) do not keep it, so that it ends with the parent.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self.path = path
        self._kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._descriptor: int | None = None

    def acquire(self, *, wait: bool) -> bool:
        """Returns True with the lock; False where another has it and `wait` is off. Raises OSError."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with ExitStack() as undo:
            undo.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, self._kind | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            undo.pop_all()
        self._descriptor = descriptor
        _HELD.add(descriptor)
        return True

    def holder(self) -> int | None:
        """Returns the pid of the last process that took it; None when it has ended."""
        text = self.path.read_text().strip()
        return int(text) if text.isdecimal() and _is_running(int(text)) else None

    def release(self) -> None:
        """Releases the lock; does nothing without it."""
        if self._descriptor in _HELD:
            _HELD.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        with disk_errors_named(self.path):
            self.acquire(wait=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


_HELD: set[int] = set()


def _release_in_child() -> None:
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_release_in_child)
