"""Write CIFAR-10 or CIFAR-100 as the folders that the recipes train on.

    regnet-reg cifar DIR
    regnet-reg cifar DIR --dataset cifar100

DIR/train/<class>/*.png holds the training images with a border of 4 black pixels, 40x40, in which the recipes' crop is
the papers': a window of 32x32, cut anywhere. DIR/validation/<class>/*.png holds the test images as they are, 32x32.

The images come from torchvision, which downloads them (170 MB) and checks them, or from --source FOLDER, a folder with
train/<class>/*.png and validation/<class>/*.png, all of 32x32. DIR/train and DIR/validation appear when they are
complete.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator, Sized, Tuple

from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from ..errors import UserError
from ..papers.cifar import CLASSES, SIZE, SIZES
from ..weights.files import check_writable
from ..weights.scoring import read_image

# an image, its class, and the name of its file
Sample = Tuple[Image.Image, str, str]


def _download(dataset: str, folder: Path, split: str) -> Tuple[Sized, Iterator[Sample]]:
    """The images as torchvision gives them; `folder` keeps its files."""
    try:
        kind = {'cifar10': CIFAR10, 'cifar100': CIFAR100}[dataset]
        data = kind(str(folder), train=split == 'train', download=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum
        raise UserError(
            f'{dataset} could not be downloaded: {error}\nCheck the connection and try again, or give --source FOLDER'
        ) from error
    return data, ((Image.fromarray(data.data[i]), data.classes[y], f'{i:05d}.png') for i, y in enumerate(data.targets))


def _read(path: Path) -> Image.Image:
    image = read_image(path, upright=False)
    if image.size != (SIZE, SIZE):
        raise UserError(f'{path}: is {image.width}x{image.height}; expected the 32x32 images of CIFAR')
    return image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('dir', metavar='DIR', help='the folder to write; must not exist, or be empty')
    parser.add_argument('--dataset', choices=list(CLASSES), default='cifar10', help='default: cifar10')
    parser.add_argument('--source', metavar='FOLDER', help='take the images of this folder instead of downloading them')


def main(args: argparse.Namespace) -> None:
    """Writes `args.dir` from torchvision's data set or the folder `args.source`; no image is left of a failure."""
    folder = Path(os.path.realpath(args.dir))
    exists = os.path.isdir(folder)
    if exists and any(not name.startswith('.') for name in os.listdir(folder)):
        raise UserError(f'{args.dir}: exists already and is not empty; give another folder, or move it away')
    check_writable(folder, folder=True)
    if args.source is not None:
        if not os.path.isdir(args.source):
            raise UserError(f'{args.source or repr(args.source)}: no such folder; expected <split>/<class>/*.png in it')
        files = {split: sorted(Path(args.source).glob(f'{split}/*/*.png')) for split in SIZES}
        names = {split: {file.parent.name for file in found} for split, found in files.items()}
        if len(names['train']) != CLASSES[args.dataset] or names['train'] != names['validation']:
            raise UserError(
                f'{args.source}: holds PNG images of {len(names["train"])} classes in train/ and '
                f'{len(names["validation"])} in validation/, expected the same {CLASSES[args.dataset]} in both'
            )

    try:
        # within the folder, which may be a mount point, or somebody's working directory, and stays what it is
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix='.', dir=folder, ignore_cleanup_errors=True) as hidden:
            for split, size in SIZES.items():
                if args.source is None:
                    images, samples = _download(args.dataset, Path(hidden, 'download'), split)
                else:
                    images, samples = files[split], ((_read(f), f.parent.name, f.name) for f in files[split])
                for image, label, name in tqdm(samples, desc=split, total=len(images), unit='image'):
                    place = Path(hidden, split, label)
                    place.mkdir(parents=True, exist_ok=True)
                    ImageOps.expand(image, (size - SIZE) // 2).save(place / name, compress_level=1)
            for split in SIZES:
                os.rename(Path(hidden, split), folder / split)
    except OSError as error:
        raise UserError(
            f'{args.dir}: could not be written ({error}); free some space there or give another folder'
        ) from error
    finally:
        if not exists:
            with suppress(OSError):  # it stays if it holds images
                folder.rmdir()
    print(f'{args.dir}: {", ".join(f"{split}/" for split in SIZES)} for train_recipes/{args.dataset}.yaml')
