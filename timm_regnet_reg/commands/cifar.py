"""Write CIFAR-10 or CIFAR-100 as the folders that the recipes train on.

    regnet-reg cifar DIR
    regnet-reg cifar DIR --dataset cifar100

DIR/train/<class>/*.png holds the training images with a border of 4 black pixels, 40x40, in which the recipes' crop is
the papers': a window of 32x32, cut anywhere. DIR/validation/<class>/*.png holds the test images as they are, 32x32.

The images come from torchvision, which downloads them (170 MB) and checks them, or from --source FOLDER, a folder with
train/<class>/<image> and validation/<class>/<image>, all of 32x32. DIR's folders appear when they are complete.
"""

import argparse
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import ImageOps
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from ..errors import UserError
from ..papers.cifar import CLASSES, SIZE, SIZES
from ..weights.files import check_writable
from ..weights.scoring import ImageFolder, check_same_classes


def _images(args: argparse.Namespace, split: str, downloads: Path) -> Any:
    """A data set of images and their labels, whose names are its `label_names`."""
    if args.source is not None:
        return ImageFolder(f'{args.source}/{split}', {'input_size': (3, SIZE, SIZE)}, CLASSES[args.dataset])
    try:
        kind = {'cifar10': CIFAR10, 'cifar100': CIFAR100}[args.dataset]
        data = kind(str(downloads), train=split == 'train', download=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the checksum
        raise UserError(f'{args.dataset}: could not be downloaded ({error}); try again, or give --source') from error
    data.label_names = data.classes
    return data


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
    try:
        # within the folder, which may be a mount point, or somebody's working directory, and stays what it is
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix='.', dir=folder, ignore_cleanup_errors=True) as hidden:
            data = {split: _images(args, split, Path(hidden, 'download')) for split in SIZES}
            check_same_classes(data['validation'], data['train'].label_names, 'train')
            for split, images in data.items():
                for name in images.label_names:
                    Path(hidden, split, name).mkdir(parents=True)
                for i in tqdm(range(len(images)), desc=split, unit='image'):
                    image, label = images[i]
                    if image.size != (SIZE, SIZE):
                        file = images.filename(i, absolute=True)
                        raise UserError(f'{file}: is {image.width}x{image.height}; expected the 32x32 images of CIFAR')
                    place = Path(hidden, split, images.label_names[label], f'{i:05d}.png')
                    ImageOps.expand(image, (SIZES[split] - SIZE) // 2).save(place, compress_level=1)
            for split in SIZES:
                os.rename(Path(hidden, split), folder / split)
    except OSError as error:
        raise UserError(f'{args.dir}: could not be written ({error}); free some space or give another') from error
    finally:
        if not exists:
            with suppress(OSError):  # it stays if it holds images
                folder.rmdir()
    print(f'{args.dir}: {", ".join(f"{split}/" for split in SIZES)} for train_recipes/{args.dataset}.yaml')
