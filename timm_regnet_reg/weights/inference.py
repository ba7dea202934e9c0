"""Loading a classifier with its labels, finding images, and predicting."""

import os
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_data_config

from ..errors import UserError, reason
from .scoring import check_device, check_finite, image_mode


def load_model(name: str, device: str = 'cpu') -> torch.nn.Module:
    """timm's classifier of that name with its weights, in evaluation mode, on a device, seen to classify an image.

    A UserError if there is no such device, model or weights, or it doesn't classify as its config says.
    """
    torch_device = check_device(device)
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # timm, the Hub's client and the file formats each raise errors of their own
        if os.path.isfile(name.removeprefix('local-dir:')):
            told = f'{name}: is a file; give local-dir:FOLDER, as `regnet-reg package` makes of a checkpoint'
            raise UserError(told) from error
        expected = 'a model of timm.list_pretrained(), hf-hub:OWNER/NAME or local-dir:FOLDER'
        raise UserError(f'{name}: could not be loaded: {reason(error)}\nExpected {expected}.') from error
    if not getattr(model, 'num_classes', 0):
        raise UserError(f'{name}: has no classifier; choose a model that was trained to classify')
    # network, config and labels must agree: where they don't, timm leaves the classifier at random
    count, said, names = model.num_classes, model.pretrained_cfg['num_classes'], model.pretrained_cfg.get('label_names')
    try:
        agree = count == said == len(class_labels(model)) and not isinstance(names, dict)
    except (TypeError, AttributeError):
        agree = False
    if not agree:
        raise UserError(
            f'{name}: its network tells {count} classes apart, but its config has num_classes {said} and label_names '
            f'{names!r:.80}, or label_descriptions of others: its answers would be wrong; correct config.json'
        )
    try_image(model, resolve_data_config(model=model), name)
    return model.to(torch_device)


def class_labels(model: torch.nn.Module) -> List[str]:
    """A label of each class: from the model's config or, by their number, ImageNet's, or its index."""
    if names := model.pretrained_cfg.get('label_names'):
        descriptions = model.pretrained_cfg.get('label_descriptions') or {}
        return [str(descriptions.get(name, name)) for name in names]
    subset = infer_imagenet_subset(model)
    return ImageNetInfo(subset).label_descriptions() if subset else [str(i) for i in range(model.num_classes)]


def _logits(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(pixels[None].to(next(model.parameters()).device))[0].float()


def try_image(model: torch.nn.Module, data_config: Dict[str, Any], source) -> None:
    """Classifies a made-up image; a UserError that names `source` if that fails."""
    try:
        image = Image.linear_gradient('L').convert(image_mode(data_config))
        logits = _logits(model, create_transform(**data_config)(image))
    except Exception as error:  # transforms and networks raise whatever they stumble over
        raise UserError(f'{source}: cannot classify an image ({reason(error)}) with {data_config}; mend it') from error
    check_finite(logits, source)


def find_images(names: Iterable[str]) -> List[str]:
    """Files as they are given, and for a folder the images in it and below, sorted; a UserError if there are none."""
    kinds = Image.registered_extensions().items()
    extensions = {extension for extension, kind in kinds if Image.MIME.get(kind, '').startswith('image/')}
    found = []
    for name in names:
        if not os.path.exists(name):
            raise UserError(f'{name or repr(name)}: no such file or folder; give images or folders of images')
        images = [name]
        if os.path.isdir(name):
            files = [file for file in sorted(Path(name).rglob('[!.]*')) if file.is_file()]
            images = [str(file) for file in files if file.suffix.lower() in extensions]
        if not images:
            raise UserError(f'{name}: holds no images; expected .jpg, .png, .webp or the like in it or below it')
        found += images
    return found


def predict(model: torch.nn.Module, images: Iterable[Image.Image], topk: int = 5) -> Iterator[List[Dict[str, Any]]]:
    """Each image's `topk` most probable classes (all, if there are fewer), the most probable first.

    Of a class there are `label`, `index` and `probability` (0 to 1). A UserError if the outputs aren't finite.
    """
    labels, data_config = class_labels(model), resolve_data_config(model=model)
    transform, mode = create_transform(**data_config), image_mode(data_config)
    for image in images:
        logits = _logits(model, transform(image.convert(mode)))
        check_finite(logits, model.pretrained_cfg['architecture'])
        top = logits.softmax(dim=0).topk(min(topk, len(labels)))
        classes = zip(top.values.tolist(), top.indices.tolist())
        yield [{'label': labels[index], 'index': index, 'probability': value} for value, index in classes]


def prediction_lines(predictions: List[Dict[str, Any]]) -> str:
    return '\n'.join(f'{100 * p["probability"]:7.2f} %  {p["label"]}' for p in predictions)
