"""Loading a classifier, reading images, and predicting, for all commands."""

import difflib
import io
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple
from urllib.request import Request, urlopen

import timm
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import (
    ImageNetInfo,
    create_transform,
    infer_imagenet_subset,
    resolve_data_config,
)
from timm.models import is_model

from ..errors import UserError

__all__ = [
    'Prediction',
    'class_labels',
    'find_images',
    'load_model',
    'predict',
    'prediction_lines',
    'read_image',
]

URL_PREFIXES = ('http://', 'https://')
BATCH_SIZE = 32


class Prediction(NamedTuple):
    """A class, the classifier's index of it, and its probability from 0 to 1."""

    label: str
    index: int
    probability: float


def load_model(name: str) -> torch.nn.Module:
    """A classifier with its weights, in evaluation mode, on the GPU if there is one.

    Args:
        name: timm's name of a model, with or without tag, 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER'.

    Raises:
        UserError: There is no such model, it has no weights, they can't be loaded, or it has no classifier.
    """
    if ':' not in name:
        architecture = name.split('.')[0]
        if not is_model(architecture):
            close = difflib.get_close_matches(architecture, timm.list_models(), 3)
            meant = f' Did you mean {", ".join(close)}?' if close else ''
            raise UserError(
                f'--model {name}: is not a model that timm knows.{meant} timm.list_pretrained() names them all; a '
                'repository of the Hub is hf-hub:OWNER/NAME, a folder local-dir:FOLDER'
            )
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, the Hub's client and the file formats each raise errors of their own
        raise UserError(
            f'--model {name}: could not be loaded: {error}\nExpected a model of timm.list_pretrained(), '
            'hf-hub:OWNER/NAME or local-dir:FOLDER.'
        ) from error
    if not model.num_classes:
        raise UserError(f'--model {name}: has no classifier; choose a model that was trained to classify')
    return model.eval().to('cuda' if torch.cuda.is_available() else 'cpu')


def class_labels(model: torch.nn.Module) -> Dict[int, str]:
    """index: label of the classes that have one, from the model's config or, by their number, ImageNet's."""
    cfg = model.pretrained_cfg
    names = cfg.get('label_names')
    if names:
        pairs = names.items() if isinstance(names, dict) else enumerate(names)  # a dict of JSON has text for keys
        descriptions = cfg.get('label_descriptions') or {}
        return {int(index): descriptions.get(name, name) for index, name in pairs}
    subset = infer_imagenet_subset(model)
    return dict(enumerate(ImageNetInfo(subset).label_descriptions())) if subset else {}


def find_images(names: Iterable[str]) -> List[str]:
    """Files and URLs as they are given; for a folder the images in it and below, by extension and sorted.

    Raises:
        UserError: There is no such file or folder, or no image in a folder.
    """
    extensions = {
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and Image.MIME.get(kind, '').startswith('image/')
    }
    found = []
    for name in names:
        path = Path(name)
        if name.startswith(URL_PREFIXES) or path.is_file():
            found.append(name)
        elif path.is_dir():
            images = sorted(
                str(file)
                for file in path.rglob('*')
                if file.suffix.lower() in extensions and not file.name.startswith('.') and file.is_file()
            )
            if not images:
                raise UserError(f'{name}: holds no images; expected .jpg, .png, .webp or the like in it or below it')
            found += images
        else:
            raise UserError(f'{name}: no such file or folder; give images, folders of images, or http(s) URLs')
    return found


def read_image(source: str) -> Image.Image:
    """An image from a file or a URL, turned the way its EXIF data says.

    Raises:
        UserError: It can't be fetched, or isn't an image, or is damaged.
    """
    file = source
    if source.startswith(URL_PREFIXES):
        try:
            # some servers turn Python's own name away
            with urlopen(Request(source, headers={'User-Agent': 'timm_regnet_reg'}), timeout=30) as response:
                file = io.BytesIO(response.read())
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(
                f'{source}: could not be fetched ({error}); check the address and the connection'
            ) from error
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise UserError(f'{source}: is not an image that Pillow can open; give a JPEG or PNG, say') from error
    except Exception as error:  # decoders raise whatever they stumble over in a damaged file
        raise UserError(f'{source}: cannot be read as an image ({error}); it may be damaged, get it again') from error


def predict(model: torch.nn.Module, images: Iterable[Image.Image], topk: int = 5) -> List[List[Prediction]]:
    """Each image's `topk` most probable classes (all of them if there are fewer), the most probable first.

    The images are prepared as the model's config says, and read only as they are needed.

    Args:
        model: A classifier of timm in evaluation mode.
        images: Images of any size and mode.
        topk: Number of classes.
    """
    labels = class_labels(model)
    data_config = resolve_data_config(model=model)
    transform = create_transform(**data_config, is_training=False)
    mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
    device = next(model.parameters()).device
    results = []
    images = iter(images)
    while batch := [transform(image.convert(mode)) for image in islice(images, BATCH_SIZE)]:
        with torch.inference_mode():
            probabilities = model(torch.stack(batch).to(device)).float().softmax(dim=1)
        top = probabilities.topk(min(topk, model.num_classes))
        results += [
            [Prediction(labels.get(i, str(i)), i, p) for p, i in zip(*row)]
            for row in zip(top.values.tolist(), top.indices.tolist())
        ]
    return results


def prediction_lines(predictions: List[Prediction]) -> str:
    return '\n'.join(f'{100 * probability:7.2f} %  {label}' for label, _, probability in predictions)
