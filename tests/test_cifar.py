"""`cifar` writes the images exactly, or nothing."""

import errno
import hashlib
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_files import raising
from torchvision.datasets import CIFAR10

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.commands import cifar

CLASSES = [f'class{i}' for i in range(10)]


def pixels(index):
    return np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def source(tmp_path):
    """An image of each class in train and validation."""
    for offset, split in (0, 'train'), (10, 'validation'):
        for index, label in enumerate(CLASSES):
            folder = tmp_path / 'source' / split / label
            folder.mkdir(parents=True)
            Image.fromarray(pixels(offset + index)).save(folder / 'a.png')
    return tmp_path / 'source'


@pytest.fixture
def archive(monkeypatch):
    """What torchvision's CIFAR10 downloads, of ten images a split: a dict of files."""

    def batch(offset):
        rows = np.stack([pixels(offset + i).transpose(2, 0, 1).ravel() for i in range(10)])
        return pickle.dumps({'data': rows, 'labels': list(range(10))})

    def download(self):
        folder = Path(self.root, self.base_folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)

    files = {'data': batch(0), 'test': batch(10), 'meta': pickle.dumps({'label_names': CLASSES})}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, 'train_list', [['data', md5['data']]])
    monkeypatch.setattr(CIFAR10, 'test_list', [['test', md5['test']]])
    monkeypatch.setattr(CIFAR10, 'meta', {'filename': 'meta', 'key': 'label_names', 'md5': md5['meta']})
    monkeypatch.setattr(CIFAR10, 'download', download)
    return files


def check(folder):
    for offset, split, size in (0, 'train', 40), (10, 'validation', 32):
        border = (size - 32) // 2
        files = sorted((folder / split).rglob('*.png'))
        assert [file.parent.name for file in files] == CLASSES
        for index, file in enumerate(files):
            expected = np.zeros((size, size, 3), dtype=np.uint8)
            expected[border : border + 32, border : border + 32] = pixels(offset + index)
            assert np.array_equal(np.asarray(Image.open(file)), expected)
    assert {path.name for path in folder.iterdir()} == {'train', 'validation'}


def test_cifar100_has_a_hundred_classes(source, tmp_path, capsys):
    command = ['cifar', str(tmp_path / 'out'), '--dataset', 'cifar100', '--source', str(source)]
    assert main(command) == 1
    assert 'train: holds 10 classes (class0, class1, class2, class3, …), expected 100' in capsys.readouterr().err
    for split in 'train', 'validation':
        for label in range(10, 100):
            shutil.copytree(source / split / 'class0', source / split / f'class{label}')
    assert main(command) == 0
    assert 'train_recipes/cifar100.yaml' in capsys.readouterr().out
    assert len(list((tmp_path / 'out').glob('*/*/*.png'))) == 200


def test_images_that_torchvision_downloads_are_padded_and_otherwise_exact(archive, tmp_path):
    assert main(['cifar', str(tmp_path / 'out')]) == 0
    check(tmp_path / 'out')


def test_a_damaged_download_leaves_nothing(archive, tmp_path, capsys):
    archive['test'] = archive['test'][:-10]
    assert main(['cifar', str(tmp_path / 'out')]) == 1
    assert 'could not be downloaded' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_cifar100_is_another_download(archive, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cifar, 'CIFAR100', raising(errno.EHOSTDOWN))
    assert main(['cifar', str(tmp_path / 'out'), '--dataset', 'cifar100']) == 1
    assert re.search(r'cifar100: could not be downloaded \(.*Host is down\)', capsys.readouterr().err)


@pytest.mark.parametrize(
    'spoil, message',
    [
        (lambda d: Image.new('RGB', (33, 32)).save(d / 'validation/class9/a.png'), 'class9/a.png: is 33x32'),
        (lambda d: os.truncate(d / 'train/class3/a.png', 1000), 'cannot be read'),
        (lambda d: (d / 'validation').rename(d / 'test'), 'validation: no such folder'),
        (lambda d: [path.unlink() for path in d.rglob('*.png')], 'train: holds no images'),
        (lambda d: (d / 'validation/class4').rename(d / 'validation/dog'), 'missing: class4; added: dog'),
    ],
)
def test_a_source_that_is_not_cifar_is_refused_and_leaves_nothing(spoil, message, source, tmp_path, capsys):
    spoil(source)
    assert main(['cifar', str(tmp_path / 'out'), '--source', str(source)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('target', ['link', 'dangling', 'here'])
def test_images_of_a_folder_are_padded_and_exact_and_the_output_stays_what_it_is(target, source, tmp_path, monkeypatch):
    """A link to a mount point, empty or not there, and the working directory, which a shell would lose."""
    real, rename = tmp_path / 'real', os.rename
    if target != 'dangling':
        real.mkdir()
        monkeypatch.chdir(real)
    (tmp_path / 'out').symlink_to(real)
    before = target != 'dangling' and real.stat().st_ino

    def rename_within_devices(path, target):
        if real in Path(path).parents and real in Path(target).parents:
            return rename(path, target)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, 'rename', rename_within_devices)
    assert main(['cifar', '.' if target == 'here' else str(tmp_path / 'out'), '--source', str(source)]) == 0
    check(real)
    assert (tmp_path / 'out').is_symlink() and before in (False, real.stat().st_ino)


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['{file}'], 'is a file'),
        (['a' * 250], 'cannot be written'),
        (['{source}'], 'not empty'),
        (['{source}/../out', '--source', ''], 'no such folder'),
    ],
)
def test_places_that_cannot_be_are_told_in_a_line(arguments, message, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(file=source / 'train/class0/a.png', source=source) for text in arguments]
    assert main(['cifar', '--source', str(source), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ['source'] and len(list(source.rglob('*.png'))) == 20
