"""Atomic writes: readers see the old or the new content, whole, even after a crash or a full disk.

    file(path)                  one file                                       one rename
    folder(path)                a folder, with all its contents                one exchange
    files(folder, last=...)     files that belong together, others kept    one exchange if possible

Files are written to a draft, a folder `.NAME.new-MARK` next to the target, and flushed to disk
before they replace it. On Linux the replacement is renameat2 with RENAME_EXCHANGE. Where the system
or the file system has no such call, the old target is moved aside and the draft takes its name: a
process that is killed between the two renames leaves no target, and the next write restores the old
one first.

A draft is locked (flock) while its process runs. A later write to the same target removes drafts of
processes that have ended, and no others; on a file system without locks, those that are a day old.
"""

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DRAFT = re.compile(r"\.(?P<name>.+?)\.(?:(?P<role>new|old)-)?(?P<mark>[0-9a-f]{32})", re.DOTALL)
DAY = 86400.0  # seconds; older drafts are stale where there are no locks
UNLOCKABLE = {
    errno.EBADF,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.EPERM,
    errno.EACCES,
}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, stdio.h


@contextlib.contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to; at the end the file replaces `path`. An error leaves `path` unchanged.

    Links are followed. A path that is not a regular file (a pipe, /dev/stdout) is written to
    directly.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        yield target
        return
    with _draft(target.parent, target.name) as draft:
        yield draft / target.name
        _flush(draft / target.name)
        with contextlib.suppress(FileNotFoundError):
            os.chmod(draft / target.name, stat.S_IMODE(target.stat().st_mode))
        os.replace(draft / target.name, target)
        _settle(target.parent)


@contextlib.contextmanager
def folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write into, which at the end replaces `path` and its contents.

    An error leaves `path` unchanged.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
    with _parents(target.parent), _draft(target.parent, target.name) as draft:
        yield draft
        _flush_all(draft)
        if target.is_dir():
            shutil.copymode(target, draft)
        if not target.exists():
            draft.rename(target)
        elif not exchange(draft, target):
            aside = draft.with_name(draft.name.replace(".new-", ".old-"))
            target.rename(aside)
            try:
                draft.rename(target)
            except BaseException:
                aside.rename(target)
                raise
            _remove(aside)
        _settle(target.parent)


@contextlib.contextmanager
def files(
    path: str | os.PathLike[str], *, last: str, stale: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """A new folder to write into, whose files then replace those in `path`; other files are kept.

    The folder is exchanged for one with the new files and hard links to the others. Where that is
    impossible (it holds folders, is the current directory or a mount, its parent is not writable,
    the file system has no links), the file `last` is removed first and written last: a killed
    process leaves a folder without it, never a mixture that is read.

    Args:
        path: the folder.
        last: the file without which the others are not read.
        stale: of a name, whether an old file of that name is removed if no new one is written.
    """
    target = Path(os.path.realpath(path))
    if not target.is_dir():
        with folder(target) as draft:
            yield draft
        return
    sweep(target, last.__eq__)
    can_exchange = _is_exchangeable(target)
    with _draft(*((target.parent, target.name) if can_exchange else (target, last))) as draft:
        yield draft
        written = sorted(entry.name for entry in draft.iterdir())
        _flush_all(draft)
        goes = lambda name: name in written or stale(name)
        if can_exchange and _exchanged(draft, target, goes):
            _settle(target.parent)
            return
        (target / last).unlink(missing_ok=True)
        _settle(target)
        for name in sorted(written, key=lambda name: name == last):
            os.replace(draft / name, target / name)
        for entry in list(target.iterdir()):
            if stale(entry.name) and entry.name not in written:
                entry.unlink()
        _settle(target)


def remove(path: Path) -> None:
    """Remove a folder so that a partly removed one is never found under its name."""
    gone = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
    os.rename(path, gone)
    _remove(gone)


def drafted(name: str) -> str | None:
    """The name that a draft will replace, or None for a name that is not a draft's."""
    match = DRAFT.fullmatch(name)
    return match["name"] if match else None


def sweep(parent: Path, is_meant: Callable[[str], bool]) -> None:
    """Remove the drafts of ended processes in a folder, for names that `is_meant` accepts.

    A target that one of them had moved aside is restored if there is none.
    """
    found: dict[str, dict[str, Path]] = {}
    with contextlib.suppress(OSError):
        for path in parent.iterdir():
            match = DRAFT.fullmatch(path.name)
            if match and is_meant(match["name"]) and _is_ours(path):
                found.setdefault(match["mark"], {})[match["role"] or "new"] = path
    for left in found.values():
        lock = _lock(left.get("new") or left["old"])
        if lock is None:
            continue
        try:
            if lock < 0 and not all(
                time.time() - path.stat().st_mtime > DAY for path in left.values()
            ):
                continue
            old = DRAFT.fullmatch(left["old"].name) if "old" in left else None
            if old is not None and not (place := parent / old["name"]).exists():
                os.rename(left["old"], place)
            for path in left.values():
                _remove(path)
        except OSError:
            continue  # another process removed it first
        finally:
            _unlock(lock)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two folders or files atomically; False if the system cannot (nothing changed)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library older than the call
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def _draft(parent: Path, name: str) -> Iterator[Path]:
    """An empty locked folder in `parent`, removed at the end."""
    sweep(parent, name.__eq__)
    path, lock = parent, None
    while lock is None:  # until no other process has taken it for a stale one
        path = parent / f".{name}.new-{uuid.uuid4().hex}"
        try:
            path.mkdir()
        except OSError as error:
            error.filename = str(parent / name)  # the name that the caller knows
            raise
        lock = _lock(path)
    try:
        yield path
    finally:
        _remove(path)
        _unlock(lock)


def _is_exchangeable(target: Path) -> bool:
    """True where a folder holds only files and links, and can be exchanged for another."""
    try:
        return (
            all(entry.is_symlink() or entry.is_file() for entry in target.iterdir())
            and target.stat().st_dev == target.parent.stat().st_dev
            and os.access(target.parent, os.W_OK | os.X_OK)
            and not target.samefile(".")
        )
    except OSError:
        return False


def _exchanged(draft: Path, target: Path, goes: Callable[[str], bool]) -> bool:
    """Exchange a folder for a draft with links to the files that stay; False if impossible.

    Nothing has changed then.
    """
    try:
        for entry in target.iterdir():
            if not goes(entry.name):
                os.link(entry, draft / entry.name, follow_symlinks=False)
        shutil.copymode(target, draft)
        _settle(draft)
    except (OSError, NotImplementedError):
        return False
    if not exchange(draft, target):
        return False
    for entry in draft.iterdir():  # files that appeared after the links were made
        if not goes(entry.name) and not os.path.lexists(target / entry.name):
            os.rename(entry, target / entry.name)
    return True


@contextlib.contextmanager
def _parents(parent: Path) -> Iterator[None]:
    """Create the folders above a path; those that were created are removed on an error."""
    missing = [above for above in (parent, *parent.parents) if not above.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for above in missing:
            with contextlib.suppress(OSError):
                above.rmdir()
        raise


def _is_ours(path: Path) -> bool:
    """True for a folder or file, not a link, that belongs to this user."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)) and (
        not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    )


def _lock(path: Path) -> int | None:
    """A file descriptor that holds the lock of a draft.

    None where another process holds it or the draft is gone; -1 where there are no locks.
    """
    if fcntl is None:
        return -1
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return -1
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.lstat(path)):
            return handle
    except OSError as error:
        if error.errno in UNLOCKABLE:
            os.close(handle)
            return -1
    os.close(handle)
    return None


def _unlock(lock: int) -> None:
    if lock >= 0:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush_all(draft: Path) -> None:
    for path in [*draft.rglob("*"), draft]:
        _flush(path)


def _flush(path: Path) -> None:
    """fsync a file, so that a rename is never on disk before its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(parent: Path) -> None:
    """fsync the entries of a folder, where its file system supports it."""
    with contextlib.suppress(OSError):
        _flush(parent)
