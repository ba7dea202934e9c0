"""The CIFAR images that the recipes train on, as `regnet-reg cifar` writes them."""

import os
from pathlib import Path
from typing import List

from ..errors import UserError

__all__ = ['BORDER', 'CLASSES', 'SIZE', 'SIZES', 'find_files']

CLASSES = {'cifar10': 10, 'cifar100': 100}
SIZE, BORDER = 32, 4  # pixels
# a side of the written images: the recipes' crop is the papers', a window of 32x32 cut anywhere in a black border
SIZES = {'train': SIZE + 2 * BORDER, 'validation': SIZE}


def find_files(root, dataset: str) -> List[Path]:
    """The images `{root}/<class>/*.png`, sorted.

    Raises:
        UserError: They are not of as many classes as the data set has.
    """
    files = sorted(Path(root).glob('*/*.png')) if os.path.isdir(root) else []  # glob fails on a name that is too long
    classes = len({file.parent.name for file in files})
    if classes != CLASSES[dataset]:
        raise UserError(
            f'{root}: holds PNG images of {classes} classes, {dataset} has {CLASSES[dataset]}; expected '
            f'{root}/<class>/*.png'
        )
    return files
