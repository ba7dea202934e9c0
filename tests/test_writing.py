"""Writing as a whole or not at all: what is left after a failure, after a killed process, and through a link."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from timm_regnet_reg.errors import UserError
from timm_regnet_reg.weights.files import check_writable, replacing

KINDS = pytest.mark.parametrize('folder', [False, True], ids=['file', 'folder'])


def write(path, text, folder):
    if folder:
        path.mkdir()
        path = path / 'content'
    path.write_text(text)


def read(path, folder):
    return (path / 'content' if folder else path).read_text()


@pytest.fixture
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


@KINDS
def test_replaced_as_a_whole(tmp_path, folder):
    for text in ('old', 'new'):
        with replacing(tmp_path / 'a/b', folder) as new:
            write(new, text, folder)
        assert read(tmp_path / 'a/b', folder) == text and os.listdir(tmp_path / 'a') == ['b']


@KINDS
@pytest.mark.parametrize('error, raised', [(OSError(28, 'disk full'), UserError), (KeyboardInterrupt(), None)])
def test_a_failure_leaves_what_was_there(tmp_path, folder, error, raised):
    write(tmp_path / 'b', 'old', folder)
    with pytest.raises(raised or type(error), match='disk full.*unchanged' if raised else None):
        with replacing(tmp_path / 'b', folder) as new:
            write(new, 'half', folder)
            raise error
    assert read(tmp_path / 'b', folder) == 'old' and os.listdir(tmp_path) == ['b']


@KINDS
def test_a_link_stays_a_link(tmp_path, folder):
    (tmp_path / 'link').symlink_to('real')
    for text in ('old', 'new'):
        with replacing(tmp_path / 'link', folder) as new:
            write(new, text, folder)
    assert os.readlink(tmp_path / 'link') == 'real' and read(tmp_path / 'real', folder) == 'new'
    assert sorted(os.listdir(tmp_path)) == ['link', 'real']


@KINDS
@pytest.mark.parametrize('missing', [False, True])
def test_what_a_dead_process_left_is_cleared_away_or_put_back(tmp_path, folder, missing, dead):
    write(tmp_path / f'.b.{dead}.new', 'half', folder)
    write(tmp_path / f'.b.{dead}.old', 'old', folder)
    if not missing:
        write(tmp_path / 'b', 'newer', folder)
    check_writable(tmp_path / 'b', folder)
    assert os.listdir(tmp_path) == ['b'] and read(tmp_path / 'b', folder) == ('old' if missing else 'newer')


def test_what_others_have_is_not_touched(tmp_path, dead):
    names = {f'.b.{os.getppid()}.new', f'.b.{dead}.txt', f'.bb.{dead}.new', f'b.{dead}.new', '.b.new', '.b.x.old'}
    for name in names:
        (tmp_path / name).touch()
    check_writable(tmp_path / 'b')
    assert {*os.listdir(tmp_path)} == names


@pytest.mark.parametrize('kill', [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_next_run_clears_away_after_a_killed_one(tmp_path, kill):
    def write_and_die():
        with replacing(tmp_path / 'b', folder=True) as new:
            new.mkdir()
            os.kill(os.getpid(), kill)

    process = multiprocessing.get_context('fork').Process(target=write_and_die)
    process.start()
    process.join()
    assert os.listdir(tmp_path) == [f'.b.{process.pid}.new']
    check_writable(tmp_path / 'b', folder=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    'path, folder, words',
    [
        ('x' * 300, False, 'File name too long'),
        ('x' * 300 + '/y', False, 'File name too long'),
        ('/proc/x', False, 'cannot be written'),
        ('file/x', False, 'Not a directory'),
        ('file', True, 'is a file, and a folder would be written'),
        ('folder', False, 'is a folder, and a file would be written'),
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
    def fails(self):
        raise PermissionError('clean-up')

    with pytest.raises(UserError, match='disk full'):
        with replacing(tmp_path / 'b') as new:
            new.touch()
            monkeypatch.setattr(Path, 'unlink', fails)
            raise OSError(28, 'disk full')
