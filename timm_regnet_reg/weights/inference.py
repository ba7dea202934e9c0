"""Loading a classifier, reading images, and predicting, for all commands."""

import difflib
import io
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout  # before Python 3.11 not the built-in one
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from threading import Thread
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

from ..errors import UserError, reason
from .folder import check_classifier
from .scoring import check_device, check_finite, convert, try_image

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
URL_BYTES = 100_000_000
URL_SECONDS = 30
BATCH_SIZE = 32


class Prediction(NamedTuple):
    """A class, the classifier's index of it, and its probability from 0 to 1."""

    label: str
    index: int  # type: ignore[assignment]  # a tuple's method of that name has no use here
    probability: float


def load_model(name: str, device: str = 'cpu') -> torch.nn.Module:
    """A classifier with its weights, in evaluation mode.

    Args:
        name: timm's name of a model, with or without tag, 'hf-hub:OWNER/NAME' or 'local-dir:FOLDER'.
        device: Where to put it: 'cpu', 'cuda', 'cuda:1' and the like.

    Raises:
        UserError: There is no such device or model, it has no weights, they can't be loaded, it has no classifier or
            one that isn't that of its weights or its labels, or it doesn't classify an image as its config says.
    """
    torch_device = check_device(device)
    if ':' not in name:
        architecture = name.split('.')[0]
        if not is_model(architecture):
            close = difflib.get_close_matches(architecture, timm.list_models(), 3)
            meant = f' Did you mean {", ".join(close)}?' if close else ''
            raise UserError(
                f'{name}: is not a model that timm knows.{meant} timm.list_pretrained() names them all; a '
                'repository of the Hub is hf-hub:OWNER/NAME, a folder local-dir:FOLDER'
            )
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, the Hub's client and the file formats each raise errors of their own
        raise UserError(
            f'{name}: could not be loaded: {reason(error)}\nExpected a model of timm.list_pretrained(), '
            'hf-hub:OWNER/NAME or local-dir:FOLDER.'
        ) from error
    if not getattr(model, 'num_classes', 0):
        raise UserError(f'{name}: has no classifier; choose a model that was trained to classify')
    try:
        class_labels(model)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f'{name}: its config has label_names or label_descriptions that are not the names of its '
            f'{model.num_classes} classes ({reason(error)}); correct config.json'
        ) from error
    check_classifier(model, name)
    try_image(model.eval(), resolve_data_config(model=model), name)
    return model.to(torch_device)


def class_labels(model: torch.nn.Module) -> Dict[int, str]:
    """index: label of the classes that have one, from the model's config or, by their number, ImageNet's.

    Raises:
        ValueError, TypeError or AttributeError: The config's labels are no names of classes.
    """
    cfg = model.pretrained_cfg
    names = cfg.get('label_names')
    if not names:
        subset = infer_imagenet_subset(model)
        return dict(enumerate(ImageNetInfo(subset).label_descriptions())) if subset else {}
    # a dict names some classes only, and one of JSON has text for keys
    pairs = names.items() if isinstance(names, dict) else enumerate(names)
    labels = {int(index): name for index, name in pairs}
    if isinstance(names, str) or not all(isinstance(name, str) for name in labels.values()):
        raise TypeError(f'{names!r:.40} was found')
    if not set(labels) <= set(range(model.num_classes)):
        raise ValueError(f'class {max(labels)} has a label')
    descriptions = cfg.get('label_descriptions') or {}
    return {index: descriptions.get(name, name) for index, name in labels.items()}


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
        if not name:
            raise UserError("an empty name ('') was given; give images, folders of images, or http(s) URLs")
        if name.startswith(URL_PREFIXES):
            found.append(name)
            continue
        path = Path(name)
        try:
            is_file, is_folder = path.is_file(), path.is_dir()
        except OSError as error:  # it is too long, say
            raise UserError(f'{name}: cannot be looked up ({error.strerror}); correct the name') from error
        if is_file:
            found.append(name)
        elif is_folder:
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


def _fetch(url: str) -> bytes:
    """What is at a URL, in a thread of its own, as urlopen's time limit counts from each packet anew.

    Raises:
        UserError: It can't be fetched, is too large, or takes too long.
    """
    answer: Future[bytes] = Future()

    def fetch() -> None:
        try:
            # some servers turn Python's own name away
            request = Request(url, headers={'User-Agent': 'timm_regnet_reg'})
            with urlopen(request, timeout=URL_SECONDS) as response:
                answer.set_result(response.read(URL_BYTES + 1))
        except BaseException as error:  # raised by result() below
            answer.set_exception(error)

    Thread(target=fetch, daemon=True).start()
    try:
        data = answer.result(URL_SECONDS)
    except (FutureTimeout, TimeoutError) as error:
        raise UserError(f'{url}: took longer than {URL_SECONDS} s; fetch it yourself and give the file') from error
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(
            f'{url}: could not be fetched ({reason(error)}); check the address and the connection'
        ) from error
    if len(data) > URL_BYTES:
        raise UserError(f'{url}: is larger than {URL_BYTES:,} bytes; fetch it yourself and give the file')
    return data


def read_image(source: str) -> Image.Image:
    """An image in RGB, 8 bits a channel, from a file or a URL, turned the way its EXIF data says.

    Raises:
        UserError: It can't be fetched, or isn't an image, or is damaged, or has grey values of unknown range.
    """
    file = io.BytesIO(_fetch(source)) if source.startswith(URL_PREFIXES) else source
    try:
        with Image.open(file) as image:
            return convert(ImageOps.exif_transpose(image), 'RGB')
    except UnidentifiedImageError as error:
        raise UserError(f'{source}: is not an image that Pillow can open; give a JPEG or PNG, say') from error
    except Exception as error:  # decoders raise whatever they stumble over in a damaged file
        raise UserError(
            f'{source}: cannot be read as an image ({reason(error)}); it may be damaged, get it again'
        ) from error


def predict(model: torch.nn.Module, images: Iterable[Image.Image], topk: int = 5) -> List[List[Prediction]]:
    """Each image's `topk` most probable classes (all of them if there are fewer), the most probable first.

    The images are prepared as the model's config says, and read only as they are needed.

    Args:
        model: A classifier of timm in evaluation mode.
        images: Images of any size and mode.
        topk: Number of classes.

    Raises:
        UserError: The outputs aren't finite.
    """
    labels = class_labels(model)
    model_name = '.'.join(
        str(model.pretrained_cfg[key]) for key in ('architecture', 'tag') if model.pretrained_cfg.get(key)
    )
    data_config = resolve_data_config(model=model)
    transform = create_transform(**data_config, is_training=False)
    mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
    device = next(model.parameters()).device
    results = []
    images = iter(images)
    while batch := [transform(convert(image, mode)) for image in islice(images, BATCH_SIZE)]:
        with torch.inference_mode():
            logits = model(torch.stack(batch).to(device)).float()
        check_finite(logits, model_name)
        probabilities = logits.softmax(dim=1)
        top = probabilities.topk(min(topk, model.num_classes))
        results += [
            [Prediction(labels.get(i, str(i)), i, p) for p, i in zip(*row)]
            for row in zip(top.values.tolist(), top.indices.tolist())
        ]
    return results


def prediction_lines(predictions: List[Prediction]) -> str:
    return '\n'.join(f'{100 * probability:7.2f} %  {label}' for label, _, probability in predictions)
