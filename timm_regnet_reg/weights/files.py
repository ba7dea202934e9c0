"""Files and folders that are replaced as a whole or not at all, whatever interrupts the writing."""

import os
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

from safetensors import SafetensorError

from ..errors import UserError

__all__ = ['check_writable', 'hidden', 'lock_folder', 'replacing']


def check_writable(path, folder: bool = False) -> None:
    """Checks before the work that its result can be written at `path`, which stays as it is.

    What dead processes left beside it is cleared away; where they had moved it aside, it comes back.

    Args:
        folder: The result is a folder, and not a file.

    Raises:
        UserError: Nothing can be written there, or what is there is of the other kind.
    """
    target = Path(os.path.realpath(path))
    new = hidden(target)
    try:
        while not _exists(new.parent):  # folders on the way are made when they are needed
            new = new.parent.with_name(new.name)
        new.mkdir()
        new.rmdir()
        if new.parent == target.parent:
            _recover(target)
        other_kind = _exists(target) and target.is_dir() != folder
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror or error}); choose another output') from error
    if other_kind:
        found, expected = ('a file', 'a folder') if folder else ('a folder', 'a file')
        raise UserError(f'{path}: is {found}, and {expected} would be written there; choose another output')


@contextmanager
def replacing(path, folder: bool = False) -> Iterator[Path]:
    """A hidden path beside `path`: what the block writes there takes `path`'s place as a whole if all goes well.

    If not, what was there stays, or comes back. A symbolic link stays one, and what it points to is replaced.

    Args:
        folder: The block makes a folder there, and not a file.

    Raises:
        UserError: Something can't be written, in the block or after it.
    """
    check_writable(path, folder)
    target = Path(os.path.realpath(path))
    new, old = hidden(target), hidden(target, 'old')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield new
        for written in (*new.rglob('*'), new):
            _sync(written)
        if folder and target.exists():  # a rename replaces a file, but no folder
            os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            if old.exists():
                os.rename(old, target)
            raise
    except (OSError, SafetensorError) as error:
        state = 'What was there is unchanged' if target.exists() else 'Nothing half written was left behind'
        raise UserError(
            f'{path}: could not be written ({error}). {state}; free some space there or choose another output'
        ) from error
    finally:
        _remove(new)
    _remove(old)


def _exists(path: Path) -> bool:
    """Unlike `Path.exists`, with an error if that can't be told (a name that is too long, say)."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def hidden(target: Path, end: str = 'new') -> Path:
    """A path beside `target`, of this process; what is there when it has ended is cleared away by `check_writable`."""
    return target.with_name(f'.{target.name}.{os.getpid()}.{end}')


def _recover(target: Path) -> None:
    """Clears away what processes that are no more left beside `target`, whose place an `.old` takes if it is empty."""
    for left in target.parent.iterdir():
        name, _, end = left.name.removeprefix(f'.{target.name}.').partition('.')
        if left.name != f'.{target.name}.{name}.{end}' or not name.isdecimal() or end not in ('new', 'old'):
            continue
        if int(name) != os.getpid() and _is_alive(int(name)):  # in containers our own number was often another's
            continue
        if end == 'old' and not target.exists():
            os.rename(left, target)
        else:
            _remove(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    """Without an error: it would hide the one that matters, and the next run tries again."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock_folder(folder: Path, seconds: float) -> int:
    """Locks a folder until its file descriptor is closed here and in all processes that inherited it.

    Raises:
        UserError: Another process holds it for longer than these seconds, or the system knows no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise UserError(f'{folder}: cannot be locked on this system; Linux and macOS can') from error

    descriptor = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError as error:
            if time.monotonic() > end:
                os.close(descriptor)
                raise UserError(f'{folder}: is in use by another process; wait for it, or stop it') from error
            time.sleep(0.1)
