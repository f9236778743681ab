"""Writing to disk in one step: a reader, a crash and a full disk find the old or the new, whole.

    file(path)                  one file                                      one rename
    folder(path)                a folder, whatever was in it                  one exchange
    files(folder, last=...)     files that must agree, beside those of others one exchange, where it can be

What is written goes into a draft, a folder `.NAME.new-MARK` beside its place, and is flushed to the
disk before the step. On Linux the step is renameat2 with RENAME_EXCHANGE. Where the system or the
file system has no such call, what was there is moved aside and the draft takes its place: a process
that is killed between the two renames leaves nothing at the place, and the next write puts what was
there back before anything else.

A draft is locked (flock) while its process lives. A later write to the same place removes drafts of
processes that have ended, and no other's; on a file system without locks, those that are a day old.
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
DAY = 86400.0  # seconds; a draft that old is of no process, where locks cannot tell
UNLOCKABLE = {errno.EBADF, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EACCES}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, stdio.h


@contextlib.contextmanager
def file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` at the end; nothing is left if anything fails.

    A link is followed. What is no regular file (a pipe, /dev/stdout) is written to as it is.
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
    """A new folder to write into, which takes the place of `path` and of all that is in it; nothing is left if anything fails."""
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
def files(path: str | os.PathLike[str], *, last: str, stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """A new folder to write files into, which then are in the folder `path`; the other files that are there stay.

    The folder is exchanged for one that holds the new files and links to the others. Where that cannot be (it holds folders, is
    the current one or a mount, its parent cannot be written, the file system has no links), the file `last` is removed first
    and comes back last: what a process that is killed leaves has no such file, and is never a mixture.

    Args:
        last: the file without which the others are not read.
        stale: of a name, whether an old file of that name goes although no new one comes.
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
    """Remove a folder so that no part of it is ever found under its name."""
    gone = path.with_name(f".{path.name}.new-{uuid.uuid4().hex}")
    os.rename(path, gone)
    _remove(gone)


def drafted(name: str) -> str | None:
    """What a draft of this name is to become, or None for a name that no draft has."""
    match = DRAFT.fullmatch(name)
    return match["name"] if match else None


def sweep(parent: Path, is_meant: Callable[[str], bool]) -> None:
    """Remove the drafts, of the names that are meant, which processes that have ended left in a folder.

    A folder that one of them had moved aside, and whose place is empty, is put back.
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
            if lock < 0 and not all(time.time() - path.stat().st_mtime > DAY for path in left.values()):
                continue
            if "old" in left and not (place := parent / DRAFT.fullmatch(left["old"].name)["name"]).exists():  # pyright: ignore[reportOptionalSubscript]
                os.rename(left["old"], place)
            for path in left.values():
                _remove(path)
        except OSError:
            continue  # another process was faster
        finally:
            _unlock(lock)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two folders or files in one step; False where the system cannot, and nothing was done."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library older than the call
        return False
    return rename(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def _draft(parent: Path, name: str) -> Iterator[Path]:
    """An empty folder in `parent`, locked, removed at the end with what is in it then."""
    sweep(parent, name.__eq__)
    path, lock = parent, None
    while lock is None:  # until no other process took it for one that was left
        path = parent / f".{name}.new-{uuid.uuid4().hex}"
        try:
            path.mkdir()
        except OSError as error:
            error.filename = str(parent / name)  # what a reader knows
            raise
        lock = _lock(path)
    try:
        yield path
    finally:
        _remove(path)
        _unlock(lock)


def _is_exchangeable(target: Path) -> bool:
    """True where a folder holds files and links alone, and may be replaced by another one."""
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
    """Exchange a folder for a draft that holds links to what does not go; False where it cannot be, and nothing was done."""
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
    for entry in draft.iterdir():  # what came since the links were made
        if not goes(entry.name) and not os.path.lexists(target / entry.name):
            os.rename(entry, target / entry.name)
    return True


@contextlib.contextmanager
def _parents(parent: Path) -> Iterator[None]:
    """The folders above a place; those that had to be made are removed if anything fails."""
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
    """True for a folder or a file, and no link, of this user."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return (stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)) and (
        not hasattr(os, "geteuid") or found.st_uid == os.geteuid()
    )


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a draft; None where another process holds it or the draft is gone; -1 without locks."""
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
    """Have the disk hold what was written, so that a rename never outlives its content."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _settle(parent: Path) -> None:
    """Have the disk hold the names in a folder, where its file system can do that."""
    with contextlib.suppress(OSError):
        _flush(parent)
