"""The folder of a packaged network, byte for byte the repository of the Hub that it can become."""

import json
import math
import os
import platform
import reprlib
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional, Tuple

import safetensors.torch
import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import is_model, save_for_hf

from .. import __version__
from ..errors import UserError, reason
from ..pretrained import check_weights, file_sha256
from .files import check_writable, replacing
from .scoring import Score, try_image

__all__ = [
    'FILES',
    'Folder',
    'check_classifier',
    'check_folder',
    'check_replaceable',
    'load_strictly',
    'model_card',
    'save_folder',
]

CONFIG, WEIGHTS, CARD = FILES = ('config.json', 'model.safetensors', 'README.md')
TOP1, TOP5 = 'Top-1 accuracy', 'Top-5 accuracy'
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')
PICKLES = ('.bin', '.pth', '.pt', '.pkl', '.pickle', '.ckpt', '.tar', '.npy', '.npz')


class Folder(NamedTuple):
    """A folder that passed `check_folder`, and the model that it holds (in evaluation mode, on the CPU)."""

    path: Path
    config: Dict[str, Any]
    card: ModelCard
    model: torch.nn.Module


def load_strictly(model: torch.nn.Module, state_dict: Dict[str, torch.Tensor], source) -> None:
    """Loads weights that must fit exactly and be finite; `source` is the file to name in a UserError."""
    try:
        check_weights(state_dict, model)
    except UserError as error:
        raise UserError(f'{source}: not the weights of {model.pretrained_cfg["architecture"]}. {error}') from error
    model.load_state_dict(state_dict)


def check_classifier(model: torch.nn.Module, source) -> None:
    """Checks that a model with the weights of a folder or repository has their classifier, and labels for it.

    timm replaces a classifier by a random one where the config's `model_args` ask for other than its `num_classes`.

    Args:
        model: The model, created without asking for `num_classes`.
        source: The folder or repository to name in a UserError.
    """
    cfg = model.pretrained_cfg
    labels = cfg.get('label_names')
    counts = {'its network has': model.num_classes, 'num_classes says': cfg['num_classes']}
    if labels and not isinstance(labels, dict):  # a dict names some of them
        counts['label_names are'] = len(labels)
    if len({*counts.values()}) > 1:
        told = ', '.join(f'{what} {count}' for what, count in counts.items())
        raise UserError(
            f'{source}: its config contradicts itself on the number of classes ({told}), so the classifier would not '
            'be the one that was trained; correct the config, or get it again'
        )


def model_card(name: str, result: Score, data: str, license: str, details: Dict[str, Any], reproduce: str) -> str:
    """The text of README.md.

    Args:
        name: `{model}.{tag}`.
        data: What the images are, in words.
        details: The rows of the table about the training, and anything else the reader must know.
        reproduce: Markdown that says how to get these weights again.
    """
    common = dict(
        task_type='image-classification', dataset_type='imagefolder', dataset_name=data, metric_type='accuracy'
    )
    metadata = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_regnet_reg'],
        model_name=name,
        eval_results=[
            EvalResult(metric_name=TOP1, metric_value=result.top1, **common),
            EvalResult(metric_name=TOP5, metric_value=result.top5, **common),
        ],
    )
    rows = {
        'Top-1': f'{result.top1:.2f} %',
        'Top-5': f'{result.top5:.2f} %',
        'Images scored': f'{result.images:,}, in float32',
        'Data': data,
        'Classes': len(result.label_names),
        **details,
        'Packaged with': f'Python {platform.python_version()}, PyTorch {torch.__version__}, timm {timm.__version__}, '
        f'timm_regnet_reg {__version__}',
        'License of the weights': license,
    }
    table = '\n'.join(f'| {key} | {str(value).replace("|", chr(92) + "|")} |' for key, value in rows.items())
    return f"""---
{metadata.to_yaml()}
---

# {name}

An image classifier for [timm](https://github.com/huggingface/pytorch-image-models) with the package
`timm_regnet_reg`.

| | |
|---|---|
{table}

## Use

```python
import timm, timm_regnet_reg
model = timm.create_model('local-dir:{name}', pretrained=True)  # on the Hub: 'hf-hub:OWNER/{name}'
```

## Reproduce

{reproduce}
"""


def check_replaceable(folder, overwrite: bool = False) -> None:
    """Checks before the work that `save_folder` can write there.

    Args:
        overwrite: A card that isn't as it was written may be replaced.

    Raises:
        UserError: The place can't be written, or holds files that are not of this kind, or a card edited by hand.
    """
    check_writable(folder, folder=True)
    folder = Path(folder)
    if not folder.is_dir():
        return
    foreign = sorted({*os.listdir(folder)} - {*FILES})
    if foreign:
        raise UserError(f'{folder}: not replaced, for it is more than a model ({", ".join(foreign)}); move it away')
    if overwrite or not (folder / CARD).exists():
        return
    try:
        written = json.loads((folder / CONFIG).read_text(encoding='utf-8')).get('card_sha256')
    except (OSError, ValueError, AttributeError):
        written = None
    if file_sha256(folder / CARD) != written:
        raise UserError(
            f'{folder / CARD}: not replaced, for it may have been edited by hand; move {folder} away, or package with '
            '--overwrite'
        )


def save_folder(
    model: torch.nn.Module,
    folder,
    tag: str,
    card: str,
    label_names: List[str],
    license: str,
    data_config: Optional[Dict[str, Any]] = None,
    overwrite: bool = False,
) -> Path:
    """Writes `config.json`, `model.safetensors` and `README.md` as a whole or not at all.

    Everything is checked before it takes the place of an earlier folder of that name.

    Args:
        card: The text of README.md, as `model_card` makes it.
        data_config: Input size, mean, std, interpolation and crop to record; by default the model's own.
        overwrite: As of `check_replaceable`.

    Raises:
        UserError: The disk is full or not writable, or the target holds other files or a card edited by hand.
    """
    check_replaceable(folder, overwrite)
    with replacing(folder, folder=True) as new:
        save_for_hf(
            model,
            str(new),
            model_config={'label_names': label_names, 'pretrained_cfg': {'tag': tag, 'license': license}},
            safe_serialization=True,
            data_config=data_config,
        )
        shutil.copymode(new / CONFIG, new / WEIGHTS)  # safetensors lets nobody else read its files
        config = json.loads((new / CONFIG).read_text(encoding='utf-8'))
        config['sha256'] = file_sha256(new / WEIGHTS)
        (new / CARD).write_text(card, encoding='utf-8')
        config['card_sha256'] = file_sha256(new / CARD)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        check_folder(new)
    return Path(folder).absolute()


def check_folder(folder) -> Folder:
    """Checks a folder as `package` writes it: its files, hash, architecture, weights and card.

    Raises:
        UserError: Names the file at fault and what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; expected one that `package` wrote')
    names = {path.name for path in folder.iterdir()}
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES))
    if pickles:
        raise UserError(
            f'{folder}: holds pickles ({", ".join(pickles)}), which can run code when loaded, so they were not opened; '
            f'remove them: the weights belong in {WEIGHTS}'
        )
    if names != {*FILES}:
        wrong = [f'{name} is missing' for name in FILES if name not in names]
        wrong += [f'{name} is not expected' for name in sorted(names - {*FILES})]
        raise UserError(f'{folder}: {", ".join(wrong)}; a folder holds exactly {", ".join(FILES)}')

    again = 'run `package` again, or restore the file'
    config = _read_config(folder / CONFIG)
    architecture = config['architecture']
    if not is_model(architecture):
        raise UserError(
            f'{folder / CONFIG}: names the architecture {architecture!r}, which is not registered in timm; '
            'install the package that has it, or correct the name'
        )
    found = file_sha256(folder / WEIGHTS)
    if found != config['sha256']:
        raise UserError(
            f'{folder / WEIGHTS}: is truncated, damaged or of another model: its SHA-256 is {found}, {CONFIG} says '
            f'{config["sha256"]}; {again}'
        )
    try:
        model = timm.create_model(f'local-dir:{folder}').eval()
    except Exception as error:  # whatever the architecture's constructor makes of wrong arguments
        raise UserError(
            f'{folder / CONFIG}: {architecture} cannot be built from it ({reason(error)}); {again}'
        ) from error
    check_classifier(model, folder / CONFIG)
    try:
        state_dict = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder / WEIGHTS}: is not a safetensors file ({reason(error)}); {again}') from error
    load_strictly(model, state_dict, folder / WEIGHTS)
    _check_use(folder, model)
    return Folder(folder, config, _read_card(folder / CARD), model)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_numbers(value: Any, valid: Callable[[float], bool] = lambda number: True) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and valid(v) for v in value
    )


# What timm reads in a config: where it stands, what it must be, and that in words. Lengths are compared afterwards.
_VALUES: Tuple[Tuple[str, Callable[[Any], bool], str], ...] = (
    ('architecture', lambda v: isinstance(v, str), 'the name of a model in timm'),
    ('sha256', lambda v: isinstance(v, str), f'the SHA-256 of {WEIGHTS}'),
    ('num_classes', _is_count, 'a whole number from 1 on'),
    ('label_names', lambda v: isinstance(v, list) and all(isinstance(n, str) and n for n in v), 'a list of names'),
    ('pretrained_cfg', lambda v: isinstance(v, dict), 'a mapping'),
    (
        'pretrained_cfg.input_size',
        lambda v: isinstance(v, list) and len(v) == 3 and all(map(_is_count, v)) and v[0] in (1, 3),
        'channels (1 or 3), height and width, whole numbers from 1 on',
    ),
    ('pretrained_cfg.interpolation', lambda v: v in INTERPOLATIONS, f'one of {", ".join(INTERPOLATIONS)}'),
    ('pretrained_cfg.crop_pct', lambda v: _are_numbers([v], lambda number: number > 0), 'a number above 0'),
    ('pretrained_cfg.crop_mode', lambda v: v in CROP_MODES, f'one of {", ".join(CROP_MODES)}'),
    ('pretrained_cfg.mean', _are_numbers, 'a list of numbers, one for each channel or for all'),
    (
        'pretrained_cfg.std',
        lambda v: _are_numbers(v, lambda number: number > 0),
        'a list of numbers above 0, one for each channel or for all',
    ),
)


def _read_config(path: Path) -> Dict[str, Any]:
    """A config whose values can be what timm expects."""
    again = 'run `package` again, or correct it'
    try:
        config = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(config, dict):
            raise ValueError(f'it holds a {type(config).__name__}')
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: is not a config that `package` wrote ({reason(error)}); {again}') from error

    def refuse(key: str, value: Any, expected: str) -> NoReturn:
        raise UserError(f'{path}: {key} is {reprlib.repr(value)}, expected {expected}; {again}')

    for key, is_valid, expected in _VALUES:
        value: Any = config
        for part in key.split('.'):
            if part not in value:
                raise UserError(f'{path}: {key} is missing, expected {expected}; {again}')
            value = value[part]
        if not is_valid(value):
            refuse(key, value, expected)
    if not isinstance(config.get('model_args', {}), dict):
        refuse('model_args', config['model_args'], 'a mapping')
    descriptions = config.get('label_descriptions', {})
    if not isinstance(descriptions, dict) or not all(isinstance(text, str) for text in descriptions.values()):
        refuse('label_descriptions', config['label_descriptions'], 'a mapping of label names to text')
    cfg = config['pretrained_cfg']
    if not isinstance(cfg.get('tag', ''), str):
        refuse('pretrained_cfg.tag', cfg['tag'], 'a word')
    for key in ('mean', 'std'):
        if len(cfg[key]) not in (1, cfg['input_size'][0]):
            refuse(f'pretrained_cfg.{key}', cfg[key], f'1 or {cfg["input_size"][0]} numbers, as there are channels')
    return config


def _check_use(folder: Path, model: torch.nn.Module) -> None:
    """Classifies an image as anybody would who loads the folder, and compares with the weights that are in it."""
    try:
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except Exception as error:  # timm's loader raises whatever it stumbles over
        raise UserError(f'{folder}: timm cannot load it ({reason(error)}); run `package` again') from error
    expected, logits = (try_image(m, resolve_data_config(model=m), folder / CONFIG) for m in (model, loaded))
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-5):
        raise UserError(
            f'{folder}: timm loads another network from it than its weights are; run `package` again, with this timm'
        )


def _read_card(path: Path) -> ModelCard:
    try:
        card = ModelCard.load(path)
    except Exception as error:  # the client stumbles in many ways over front matter that it doesn't expect
        raise UserError(f'{path}: its front matter cannot be read ({reason(error)}); run `package` again') from error
    missing = [] if card.data.license else ['license']
    if TOP1 not in [result.metric_name for result in card.data.eval_results or []]:
        missing.append(f'model-index with "{TOP1}"')
    if missing:
        raise UserError(f'{path}: its front matter lacks {" and ".join(missing)}; run `package` again')
    return card
