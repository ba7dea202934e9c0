"""The folder of a packaged network, byte for byte the repository of the Hub that it can become."""

import hashlib
import json
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, NamedTuple

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import save_for_hf

from .. import __version__
from ..errors import UserError, reason
from .files import check_writable, replacing
from .inference import load_model
from .scoring import Score

__all__ = ['FILES', 'Folder', 'check_folder', 'check_replaceable', 'file_sha256', 'save_folder']

CONFIG, WEIGHTS, CARD = FILES = ('config.json', 'model.safetensors', 'README.md')
TOP1, TOP5 = 'Top-1 accuracy', 'Top-5 accuracy'


def file_sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, 'rb') as file:
        return hashlib.sha256(file.read()).hexdigest()


class Folder(NamedTuple):
    """A folder that passed `check_folder`, and the model that it holds (in evaluation mode, on the CPU)."""

    path: Path
    config: Dict[str, Any]
    card: ModelCard
    model: torch.nn.Module


def _model_card(name: str, result: Score, data: str, license: str, details: Dict[str, Any], reproduce: str) -> str:
    task = 'image-classification'
    common = dict(task_type=task, dataset_type='imagefolder', dataset_name=data, metric_type='accuracy')
    scores = {TOP1: result.top1, TOP5: result.top5}
    metadata = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', 'timm_regnet_reg'],
        model_name=name,
        eval_results=[EvalResult(metric_name=key, metric_value=value, **common) for key, value in scores.items()],
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
    """Checks before the work that `save_folder` may write there.

    Raises:
        UserError: The place can't be written, or holds other files, or a card edited by hand without `overwrite`.
    """
    check_writable(folder, folder=True)
    if not os.path.isdir(folder):
        return
    config, card = Path(folder, CONFIG), Path(folder, CARD)
    if foreign := sorted({*os.listdir(folder)} - {*FILES}):
        raise UserError(f'{folder}: not replaced, for it is more than a model ({", ".join(foreign)}); move it away')
    written = config.read_text(encoding='utf-8') if config.exists() else ''
    if card.exists() and not overwrite and file_sha256(card) not in written:
        raise UserError(f'{card}: not replaced, for it may be edited by hand; move {folder} away, or --overwrite it')


def save_folder(
    model: torch.nn.Module,
    folder,
    result: Score,
    data: str,
    license: str,
    details: Dict[str, Any],
    reproduce: str,
    data_config: Dict[str, Any],
) -> None:
    """Writes `config.json`, `model.safetensors` and `README.md`, checked, as a whole or not at all.

    Args:
        folder: `…/{model}.{tag}`, which `check_replaceable` lets be replaced.
        data: What the images are that were scored, in words.
        details: The rows of the card's table about the training, and anything else the reader must know.
        reproduce: Markdown that says how to get these weights again.
        data_config: Input size, mean, std, interpolation and crop to record.

    Raises:
        UserError: The disk is full or not writable.
    """
    name = Path(folder).name
    cfg = {'tag': name.partition('.')[2], 'license': license}
    told = {'label_names': result.label_names, 'pretrained_cfg': cfg}
    with replacing(folder, folder=True) as new:
        save_for_hf(model, str(new), model_config=told, safe_serialization=True, data_config=data_config)
        with suppress(OSError):  # safetensors lets nobody else read its files; some mounts know no permissions
            shutil.copymode(new / CONFIG, new / WEIGHTS)
        config = json.loads((new / CONFIG).read_text(encoding='utf-8'))
        config['sha256'] = file_sha256(new / WEIGHTS)
        (new / CARD).write_text(_model_card(name, result, data, license, details, reproduce), encoding='utf-8')
        config['card_sha256'] = file_sha256(new / CARD)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        check_folder(new)


def check_folder(folder) -> Folder:
    """Checks a folder's files, the hash of the weights, card and network; a UserError names what is at fault."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; expected one that `package` wrote')
    names = {path.name for path in folder.iterdir()}
    if names != {*FILES}:
        missing, foreign = (', '.join(sorted(some)) or 'nothing' for some in ({*FILES} - names, names - {*FILES}))
        raise UserError(f'{folder}: holds other files than `package` wrote; missing: {missing}; added: {foreign}')
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        expected = config['sha256']
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f'{folder / CONFIG}: is not a config that `package` wrote ({error!r}); restore it') from error
    if file_sha256(folder / WEIGHTS) != expected:
        raise UserError(
            f'{folder / WEIGHTS}: is damaged or of another model, as its SHA-256 is not {expected}, which {CONFIG} '
            'says; run `package` again, or restore the file'
        )
    try:
        card = ModelCard.load(folder / CARD)
        scored = [result.metric_name for result in card.data.eval_results or []]
    except Exception as error:  # the client stumbles in many ways over front matter that it doesn't expect
        raise UserError(f'{folder / CARD}: its front matter cannot be read ({reason(error)}); restore it') from error
    if not card.data.license or TOP1 not in scored:
        raise UserError(f'{folder / CARD}: its front matter lacks a license or the "{TOP1}"; restore it')
    return Folder(folder, config, card, load_model(f'local-dir:{folder}'))
