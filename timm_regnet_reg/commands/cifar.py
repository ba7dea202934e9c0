"""Write CIFAR-10 or CIFAR-100 as the folders that the recipes train on.

    regnet-reg cifar DIR
    regnet-reg cifar DIR --dataset cifar100

DIR/train/<class>/*.png holds the training images with a border of 4 black pixels, 40x40, in which the recipes' crop is
the papers': a window of 32x32, cut anywhere. DIR/validation/<class>/*.png holds the test images as they are, 32x32.

The images come from torchvision, which downloads them (170 MB) and checks them, or from --source FOLDER, a folder with
train/<class>/*.png and validation/<class>/*.png, all of 32x32. DIR appears when it is complete.
"""

import argparse
import os
import shutil
from pathlib import Path
from typing import Iterator, List, Tuple

from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from ..errors import UserError, reason
from ..weights.files import check_writable

DATASETS = {'cifar10': CIFAR10, 'cifar100': CIFAR100}
SIZE, BORDER = 32, 4
SPLITS = {'train': BORDER, 'validation': 0}

# an image, its class, and the name of its file
Sample = Tuple[Image.Image, str, str]


def _download(dataset: str, folder: Path, split: str) -> Tuple[int, Iterator[Sample]]:
    """The number of images, and the images as torchvision gives them; `folder` keeps its files."""
    try:
        data = DATASETS[dataset](str(folder), train=split == 'train', download=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum
        raise UserError(
            f'{dataset} could not be downloaded: {error}\nCheck the connection and try again, or give --source FOLDER'
        ) from error
    samples = ((Image.fromarray(data.data[i]), data.classes[y], f'{i:05d}.png') for i, y in enumerate(data.targets))
    return len(data), samples


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # decoders raise whatever they stumble over in a damaged file
        raise UserError(f'{path}: cannot be read as an image ({reason(error)}); get it again') from error
    if image.size != (SIZE, SIZE) or image.mode != 'RGB':
        width, height = image.size
        raise UserError(f'{path}: is {width}x{height} ({image.mode}); expected the 32x32 RGB images of CIFAR')
    return image


def _files(source: Path, split: str, dataset: str) -> List[Path]:
    """The images of a split in a folder, sorted, having checked that there are as many classes as there should be."""
    root = source / split
    files = sorted(root.glob('*/*.png')) if os.path.isdir(root) else []  # glob fails on a name that is too long
    classes = {file.parent.name for file in files}
    expected = int(dataset.removeprefix('cifar'))
    if len(classes) != expected:
        raise UserError(
            f'{root}: holds PNG images of {len(classes)} classes, {dataset} has {expected}; '
            f'expected {root}/<class>/*.png'
        )
    return files


def _open(files: List[Path]) -> Iterator[Sample]:
    return ((_read(file), file.parent.name, file.name) for file in files)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('dir', metavar='DIR', help='the folder to write; must not exist, or be empty')
    parser.add_argument('--dataset', choices=['cifar10', 'cifar100'], default='cifar10', help='default: cifar10')
    parser.add_argument('--source', metavar='FOLDER', help='take the images of this folder instead of downloading them')


def main(args: argparse.Namespace) -> None:
    """Write `args.dir` from torchvision's data set or the folder `args.source`.

    Raises:
        UserError: The folder can't be written or isn't empty, the source lacks images or has others than CIFAR's, or
            the download failed. No image is left of an attempt that failed.
    """
    folder = Path(os.path.realpath(args.dir))
    exists = os.path.isdir(folder)
    # what a process that was killed left is no content: check_writable clears it away
    if exists and any(not name.startswith('.train.') for name in os.listdir(folder)):
        raise UserError(f'{args.dir}: exists already and is not empty; give another folder, or move it away')
    # a folder that is there stays and is filled: a mount point, or somebody's working directory
    target = folder / 'train' if exists else folder
    check_writable(target, folder=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.new")
    if args.source is not None:
        files = {split: _files(Path(args.source), split, args.dataset) for split in SPLITS}
        classes = {split: {file.parent.name for file in files[split]} for split in SPLITS}
        if classes['train'] != classes['validation']:
            only = ', '.join(sorted(classes['train'] ^ classes['validation']))
            raise UserError(f'{args.source}: train and validation hold different classes; only one of them has {only}')

    try:
        partial.mkdir(parents=True)
        for split, border in SPLITS.items():
            if args.source is not None:
                total, samples = len(files[split]), _open(files[split])
            else:
                total, samples = _download(args.dataset, partial / 'download', split)
            for image, label, name in tqdm(samples, desc=split, total=total, unit='image'):
                place = partial / split / label
                place.mkdir(parents=True, exist_ok=True)
                ImageOps.expand(image, border).save(place / name, compress_level=1)
        if exists:
            for split in SPLITS:
                (partial / split).rename(folder / split)
        else:
            shutil.rmtree(partial / 'download', ignore_errors=True)
            partial.rename(folder)
    except OSError as error:
        raise UserError(
            f'{args.dir}: could not be written ({error}); free some space there or give another folder'
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f'{args.dir}: {", ".join(f"{split}/" for split in SPLITS)} for train_recipes/{args.dataset}.yaml')
