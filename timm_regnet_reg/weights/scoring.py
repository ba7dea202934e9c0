"""Accuracy on folders of images, and what must be right before it is measured."""

import os
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import UserError, reason

__all__ = [
    'ImageFolder',
    'Score',
    'check_device',
    'check_finite',
    'check_same_classes',
    'convert',
    'score',
    'score_loader',
    'try_image',
]

LARGEST_SIDE = 4096  # pixels
SMALLEST_CROP = 0.1  # of the image's sides


class Score(NamedTuple):
    """Accuracies in percent, the number of images they were measured on, and the class names in label order."""

    top1: float
    top5: float
    images: int
    label_names: List[str]


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UserError: The name is none, or the machine has no such device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda') or device.type == 'cpu' and device.index:
        raise UserError(f'--device {name}: expected cpu, cuda or cuda:N')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {name}: torch finds {torch.cuda.device_count()} CUDA devices; --device cpu works')
    return device


def check_finite(logits: torch.Tensor, source) -> None:
    """Raises a UserError, which names `source`, if logits aren't all finite."""
    if not logits.isfinite().all():
        raise UserError(
            f'{source}: the network gives outputs that are not finite (NaN or infinite); take weights from before the '
            'training diverged'
        )


def convert(image: Image.Image, mode: str) -> Image.Image:
    """An image in mode 'L' or 'RGB', with grey of 16 bits scaled, which Pillow clips and thereby turns white.

    Raises:
        ValueError: The range of its values isn't known.
    """
    if image.mode.startswith('I;16'):
        image = image.convert('I').point(lambda value: value * (1 / 257) + 0.5).convert('L')
    elif image.mode in ('I', 'F'):
        raise ValueError('it has 32 bits a pixel, and what is white is not known; save it with 8 or 16')
    return image.convert(mode)


class ImageFolder(ImageDataset):
    """timm's images of `{root}/<class>/<image>`, but one that can't be read is an error, not replaced by the next.

    Args:
        data_config: As `timm.data.resolve_data_config` gives it.
        num_classes: How many classes the images must be of.
        transform: What prepares an image; timm's loader sets its own.

    Raises:
        UserError: There is no such folder, or it holds no images, another number of classes, or a class twice.
    """

    def __init__(self, root, data_config: Dict[str, Any], num_classes: int, transform=None) -> None:
        if not os.path.isdir(root):
            raise UserError(f'{root}: no such folder; expected the images as {root}/<class>/<image>')
        try:
            super().__init__(str(root), input_img_mode=_mode(data_config), transform=transform)
        except RuntimeError as error:
            raise UserError(f'{root}: holds no images; expected {root}/<class>/<image>. {error}') from error
        self.label_names = sorted(self.reader.class_to_idx, key=self.reader.class_to_idx.get)
        folders = sorted({os.path.dirname(name) for name in self.filenames(absolute=True)})
        if len(folders) > len(self.label_names):
            names = [os.path.basename(folder) for folder in folders]
            twice = [folder for folder, name in zip(folders, names) if names.count(name) > 1]
            raise UserError(
                f'{root}: holds a class twice ({", ".join(twice[:2])}, …), which would be taken together; expected '
                f'{root}/<class>/<image>'
            )
        if len(self.label_names) != num_classes:
            raise UserError(
                f'{root}: holds {len(self.label_names)} classes ({", ".join(self.label_names[:4])}, …), but the model '
                f'tells {num_classes} apart; give the data that it was trained on'
            )

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        try:
            file, label = self.reader[index]
            with file, Image.open(file) as opened:
                image = convert(opened, self.input_img_mode)
        except Exception as error:  # decoders raise whatever they stumble over in a damaged file
            name = self.filename(index, absolute=True)
            raise UserError(
                f'{name}: cannot be read as an image ({reason(error)}); get it again, or move it away'
            ) from error
        return self.transform(image) if self.transform else image, label


def check_same_classes(images: ImageFolder, training_root) -> None:
    """Checks that images are of the classes that training images are of, whose order makes the labels.

    Args:
        training_root: `{training_root}/<class>/<image>`; what isn't there isn't compared.

    Raises:
        UserError: A class is missing, or added, or has another name.
    """
    if not os.path.isdir(training_root):
        return
    trained = set(find_images_and_targets(str(training_root), sort=False)[1])
    found = set(images.label_names)
    if trained and found != trained:
        lacks, adds = (', '.join(sorted(names)[:4]) or 'none' for names in (trained - found, found - trained))
        raise UserError(
            f'{images.reader.root}: its classes are not those of {training_root} (missing: {lacks}; added: {adds}), so '
            'labels would be shifted; give the data that the network was trained on'
        )


def try_image(model: torch.nn.Module, data_config: Dict[str, Any], source) -> torch.Tensor:
    """Logits (1, num_classes) of one image, made up and prepared for the model, on the CPU and in evaluation mode.

    Raises:
        UserError: It can't be prepared or classified, or the logits aren't finite. `source` is the file to name.
    """
    try:
        # before an image is made of a size that no memory holds
        if max(data_config['input_size'][1:]) > LARGEST_SIDE or not data_config['crop_pct'] >= SMALLEST_CROP:
            raise ValueError(f'sides up to {LARGEST_SIDE} and a crop_pct from {SMALLEST_CROP} on are expected')
        image = Image.linear_gradient('L').convert(_mode(data_config))
        with torch.inference_mode():
            logits = model(create_transform(**data_config)(image)[None])
        if logits.shape != (1, model.num_classes):
            raise ValueError(f'its outputs are of shape {tuple(logits.shape)}')
    except Exception as error:  # transforms and networks raise whatever they stumble over
        raise UserError(
            f'{source}: an image cannot be prepared and classified as it says ({reason(error)}), with {data_config}; '
            'correct that, or get it again'
        ) from error
    check_finite(logits, source)
    return logits


def _mode(data_config: Dict[str, Any]) -> str:
    return 'L' if data_config['input_size'][0] == 1 else 'RGB'


def score(
    model: torch.nn.Module,
    images: ImageFolder,
    data_config: Dict[str, Any],
    batch_size: int = 128,
    workers: int = 2,
    device: torch.device = torch.device('cpu'),
    desc: str = 'scoring',
) -> Score:
    """Accuracy on a folder of images, with timm's loader and a progress bar on stderr.

    Args:
        model: Images (B, C, height, width) to logits (B, num_classes).
        data_config: Input size, mean, std, interpolation and crop, as `timm.data.resolve_data_config` gives them.
        desc: Label of the progress bar.

    Raises:
        UserError: An image can't be read, or the outputs are not finite or not one for each class.
    """
    loader = create_loader(
        images, **data_config, batch_size=batch_size, num_workers=workers, use_prefetcher=False, device=device
    )
    return score_loader(model, loader, images.label_names, device, desc)


def score_loader(
    model: torch.nn.Module,
    loader: DataLoader,
    label_names: List[str],
    device: torch.device = torch.device('cpu'),
    desc: str = 'scoring',
) -> Score:
    """As `score`, on the batches (images, labels) of a loader."""
    top1, top5 = AverageMeter(), AverageMeter()
    model.to(device).eval()
    try:
        # closed in any case, so that an error starts on a line of its own
        with torch.inference_mode(), tqdm(loader, desc=desc, unit='batch') as batches:
            for batch, labels in batches:
                logits = model(batch.to(device))
                if logits.shape != (len(batch), len(label_names)):
                    raise UserError(
                        f'{desc}: the network gives {tuple(logits.shape[1:])} outputs an image for {len(label_names)} '
                        'classes; give the data that it was trained on'
                    )
                check_finite(logits, desc)
                acc1, acc5 = accuracy(logits, labels.to(device), topk=(1, 5))
                top1.update(acc1.item(), len(batch))
                top5.update(acc5.item(), len(batch))
    except UserError as error:
        # one of a worker process arrives with its traceback for a message
        raise UserError(str(error).rpartition(f'{UserError.__name__}: ')[2].strip()) from error
    model.cpu()
    return Score(round(top1.avg, 3), round(top5.avg, 3), top1.count, label_names)
