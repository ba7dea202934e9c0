"""Reading images, and accuracy on folders of them."""

import os
from pathlib import Path
from typing import Any, List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import ImageDataset, create_loader
from timm.task.evaluator import ClassificationEvaluator
from tqdm import tqdm

from ..errors import UserError, reason


class Score(NamedTuple):
    """Accuracies in percent, the number of images they were measured on, and the class names in label order."""

    top1: float
    top5: float
    images: int
    label_names: List[str]


def check_device(name: str) -> torch.device:
    """The device of that name; a UserError if the name is none, or the machine has no such device."""
    try:
        torch.zeros(1, device=name).item()  # `meta` is a device that computes nothing
    except Exception as error:  # each backend raises errors of its own
        told = reason(error).splitlines()[0]
        raise UserError(f'--device {name}: expected cpu, cuda or cuda:N that torch can compute on ({told})') from error
    return torch.device(name)


def check_finite(logits: torch.Tensor, source) -> None:
    """Raises a UserError, which names `source`, if logits aren't all finite."""
    if not logits.isfinite().all():
        raise UserError(f'{source}: the outputs are not finite; take weights from before the training diverged')


def image_mode(data_config: dict) -> str:
    """Pillow's mode of the images that a network takes: 'L' for one channel, 'RGB' for three, or a ValueError."""
    channels = data_config['input_size'][0]
    if channels not in (1, 3):
        raise ValueError(f'it takes {channels} channels, and images have 1 or 3')
    return 'L' if channels == 1 else 'RGB'


def read_image(path, mode: str = 'RGB', upright: bool = True) -> Image.Image:
    """An image with 8 bits a channel; a UserError if it is none, or damaged, or has grey values of unknown range.

    With `upright` it is turned the way its EXIF data says. timm's data sets, for training and for scoring, don't.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened) if upright else opened
            if image.mode.startswith('I;16'):  # which Pillow would clip, so that grey became white
                image = image.convert('I').point(lambda value: value * (1 / 257) + 0.5).convert('L')
            elif image.mode in ('I', 'F'):
                raise ValueError('it has 32 bits a pixel, and what is white is not known; save it with 8 or 16')
            return image.convert(mode)
    except Exception as error:  # decoders raise whatever they stumble over in a damaged file
        raise UserError(f'{path}: cannot be read as an image ({reason(error)}); get it again, or remove it') from error


def split_folder(data_dir, split: str) -> Path:
    """The folder of a split of the data; a UserError if it is all of the data, training images included."""
    root = Path(data_dir, split)
    if root.resolve() == Path(data_dir).resolve():
        raise UserError(f'--split {split!r}: is all of {data_dir}, training included; give a folder in it (validation)')
    return root


class ImageFolder(ImageDataset):
    """timm's images of `{root}/<class>/<image>`, but one that can't be read is an error, not replaced by the next.

    A UserError if there are none, or of another number of classes. timm's loader sets a transform of its own.
    """

    def __init__(self, root, data_config: dict, num_classes: int, transform=None) -> None:
        if not os.path.isdir(root):
            raise UserError(f'{root}: no such folder; expected the images as {root}/<class>/<image>')
        try:
            super().__init__(str(root), input_img_mode=image_mode(data_config), transform=transform)
        except RuntimeError as error:
            raise UserError(f'{root}: holds no images; expected {root}/<class>/<image>. {error}') from error
        self.label_names = [*self.reader.class_to_idx]  # in the order of their numbers
        if len(self.label_names) != num_classes:
            told = ', '.join([*self.label_names[:4], '…'][: len(self.label_names)])
            told = f'{len(self.label_names)} classes ({told}), expected {num_classes}'
            raise UserError(f'{root}: holds {told}; give the data of those classes')

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        path, label = self.reader.samples[index]
        image = read_image(path, self.input_img_mode, upright=False)
        return self.transform(image) if self.transform else image, label


def check_same_classes(images: ImageFolder, expected: Sequence[str], source) -> None:
    """Raises a UserError unless images are of the classes, if any, that `source` expects, in their order."""
    if expected and images.label_names != [*expected]:
        mine, given = {*expected}, {*images.label_names}
        lacks, adds = (', '.join(sorted(names)[:4]) or 'none' for names in (mine - given, given - mine))
        told = f'its classes, or their order, are not those of {source} (missing: {lacks}; added: {adds})'
        raise UserError(f'{images.reader.root}: {told}, so labels would be mistaken; give data of those classes')


def score(
    model: nn.Module, images, data_config: dict, batch_size: int = 128, workers: int = 2, desc: str = 'scoring'
) -> Score:
    """Accuracy on images, where the model is, with timm's loader and a progress bar on stderr.

    `images` is an `ImageFolder`, or another data set with `label_names` whose transform timm's loader may set. A
    UserError if an image can't be read, or the outputs are not finite.
    """
    device = next(model.parameters(), torch.empty(0)).device  # an ONNX file has no parameters, and is on the CPU
    loader = create_loader(
        images, **data_config, batch_size=batch_size, num_workers=workers, use_prefetcher=False, device=device
    )
    evaluator = ClassificationEvaluator(device)
    model.eval()
    try:
        # closed in any case, so that an error starts on a line of its own
        with torch.inference_mode(), tqdm(loader, desc=desc, unit='batch') as batches:
            for batch, labels in batches:
                logits = model(batch.to(device))
                check_finite(logits, desc)
                evaluator.update(logits, labels.to(device))
    except UserError as error:
        # one of a worker process arrives with its traceback for a message
        raise UserError(str(error).rpartition(f'{UserError.__name__}: ')[2].strip()) from error
    top1, top5 = (round(evaluator.compute()[name], 3) for name in ('top1', 'top5'))
    return Score(top1, top5, evaluator.num_samples, images.label_names)
