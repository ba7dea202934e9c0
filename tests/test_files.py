"""Writing as a whole or not at all: what is left after a failure, on odd file systems, and through a link."""

import errno
import os

import pytest

from timm_regnet_reg.errors import UserError
from timm_regnet_reg.weights.files import check_writable, locked, replacing

KINDS = pytest.mark.parametrize('folder', [False, True], ids=['file', 'folder'])


def write(path, text, folder):
    if folder:
        path.mkdir()
        path = path / 'content'
    path.write_text(text)


def read(path, folder):
    return (path / 'content' if folder else path).read_text()


def raising(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@KINDS
def test_replaced_as_a_whole_with_the_permissions_of_any_new_file(tmp_path, folder):
    for text in ('old', 'new'):
        with replacing(tmp_path / 'a/b', folder) as new:
            write(new, text, folder)
        assert read(tmp_path / 'a/b', folder) == text and os.listdir(tmp_path / 'a') == ['b']
    write(tmp_path / 'ordinary', '', folder)
    assert (tmp_path / 'a/b').stat().st_mode == (tmp_path / 'ordinary').stat().st_mode


@KINDS
@pytest.mark.parametrize(
    'error, told',
    [
        (OSError('full'), 'full.*unchanged'),
        (KeyboardInterrupt('stop'), '^stop$'),
        (None, 'No space left on device.*unchanged'),  # when the new one takes the place
    ],
)
def test_a_failure_leaves_what_was_there(tmp_path, folder, error, told, monkeypatch):
    monkeypatch.setattr(os, 'replace', raising(errno.ENOSPC))
    write(tmp_path / 'b', 'old', folder)
    with pytest.raises((UserError, KeyboardInterrupt), match=told):
        with replacing(tmp_path / 'b', folder) as new:
            write(new, 'half', folder)
            if error:
                raise error
    assert read(tmp_path / 'b', folder) == 'old' and os.listdir(tmp_path) == ['b']


@KINDS
def test_a_link_stays_a_link_also_on_a_file_system_that_cannot_sync_or_change_modes(tmp_path, folder, monkeypatch):
    """As CIFS, vboxsf, FUSE and S3 mounts."""
    for name in ('fsync', 'chmod', 'fchmod'):
        monkeypatch.setattr(os, name, raising(errno.EPERM))
    (tmp_path / 'link').symlink_to('real')
    for text in ('old', 'new'):
        with replacing(tmp_path / 'link', folder) as new:
            write(new, text, folder)
    assert os.readlink(tmp_path / 'link') == 'real' and read(tmp_path / 'real', folder) == 'new'
    assert sorted(os.listdir(tmp_path)) == ['link', 'real']


@pytest.mark.parametrize(
    'path, folder, words',
    [
        ('x' * 300, False, 'File name too long'),
        ('missing/' + 'x' * 300, False, 'File name too long'),
        ('/proc/x', False, 'cannot be written'),
        ('file/x', False, 'Not a directory'),
        ('file', True, 'is a file, which is not replaced'),
        ('folder', False, 'is a folder, which is not replaced'),
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch, path, folder, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').touch()
    (tmp_path / 'folder').mkdir()
    with pytest.raises(UserError, match=words) as error:
        check_writable(path, folder)
    assert str(error.value).startswith(f'{path}: ') and 'choose another output' in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


def test_an_error_of_the_clean_up_does_not_hide_the_failure(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='disk full'):
        with replacing(tmp_path / 'b') as new:
            new.touch()
            monkeypatch.setattr(os, 'unlink', raising(errno.EACCES))
            raise OSError(28, 'disk full')


@pytest.mark.parametrize('number', [None, errno.ENOLCK, errno.ENOSYS])
@pytest.mark.filterwarnings('ignore:flock not supported')
def test_a_lock_keeps_others_out_until_its_holder_ends(tmp_path, number, monkeypatch):
    """Also where the system has no locks, as Lustre and some NFS; where it has, a killed process leaves none."""
    path = tmp_path / 'a/b'
    if number:
        monkeypatch.setattr('fcntl.flock', raising(number))
    else:
        path.parent.mkdir()
        (tmp_path / 'a/.b.lock').touch()
    with locked(path, seconds=0):
        with pytest.raises(UserError, match='b: is in use by another process; wait for it'):
            with locked(path, seconds=0.2):
                pytest.fail('two have it')
    with locked(path, seconds=1):
        pass


def test_an_error_in_the_block_is_not_taken_for_one_of_the_lock(tmp_path):
    with pytest.raises(OSError, match='of the block'):
        with locked(tmp_path / 'b', seconds=0):
            raise OSError('of the block')
    with pytest.raises(UserError, match='^/proc/x/y: cannot be locked'):
        with locked('/proc/x/y', seconds=0):
            pass
