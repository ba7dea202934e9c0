"""Files and folders that are replaced as a whole or not at all, and a lock for those that several processes write."""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator

from filelock import FileLock, SoftFileLock, Timeout
from safetensors import SafetensorError

from ..errors import InUse, UserError


def check_writable(path, folder: bool = False) -> None:
    """Checks before the work that its result, a file or a folder, can be written at `path`; a UserError if not."""
    target = Path(os.path.realpath(path))
    place = target.parent
    try:
        while not place.exists():  # folders on the way are made when they are needed
            place = place.parent
        with TemporaryDirectory(prefix=f'.{target.name}.', dir=place, ignore_cleanup_errors=True):
            other_kind = target.exists() and target.is_dir() != folder
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror or error}); choose another output') from error
    if other_kind:
        raise UserError(f'{path}: is a {"file" if folder else "folder"}, which is not replaced; choose another output')


@contextmanager
def replacing(path, folder: bool = False) -> Iterator[Path]:
    """A path of the same name in a hidden folder beside `path`, whose place it takes if the block ends well.

    Otherwise what was there stays, and a UserError says what couldn't be written, in the block or after it. A symbolic
    link stays one, and what it points to is replaced.
    """
    check_writable(path, folder)
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # what can't be cleaned up must not hide the error that matters
        with TemporaryDirectory(prefix=f'.{target.name}.', dir=target.parent, ignore_cleanup_errors=True) as hidden:
            new, old = Path(hidden, target.name), Path(hidden, 'old')
            yield new
            try:
                if folder and target.exists():  # `os.replace` replaces a file, but no folder
                    os.rename(target, old)
                os.replace(new, target)
            finally:
                if old.exists() and not target.exists():
                    os.rename(old, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: could not be written ({error}) and is unchanged; choose another output') from error


@contextmanager
def locked(path, seconds: float) -> Iterator[None]:
    """Holds the lock of a file or folder, a file `.{name}.lock` beside it; `InUse` if others do for these seconds.

    Where the system has no locks, the file's existence is the lock, which may have to be removed by hand after a crash.
    """
    target = Path(os.path.realpath(path))
    place = target.with_name(f'.{target.name}.lock')
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(place).acquire(seconds)
        except Timeout:
            raise
        except OSError:  # no locks on Lustre and some NFS
            place = target.with_name(f'.{target.name}.softlock')
            lock = SoftFileLock(place).acquire(seconds)
    except Timeout as error:
        raise InUse(
            f'{path}: is in use by another process; wait for it, or stop it (if there is none, remove {place})'
        ) from error
    except OSError as error:
        raise UserError(f'{path}: cannot be locked ({error}); choose another place') from error
    with lock:
        yield
