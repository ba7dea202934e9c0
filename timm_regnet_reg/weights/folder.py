"""The folder of a packaged network, which can become a repository of the Hub."""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, NamedTuple

import timm
import torch
import torch.nn as nn
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import save_for_hf

from .. import __version__
from ..errors import UserError, reason
from .files import check_writable, replacing
from .inference import load_model
from .scoring import Score

CONFIG, WEIGHTS, CARD = FILES = ('config.json', 'model.safetensors', 'README.md')
# what a config says of the weights that a network started from isn't true of others
PROVENANCE = ('label_names', 'label_descriptions', 'description', 'notes', 'origin_url', 'paper_name', 'paper_ids')


def file_sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class Folder(NamedTuple):
    """A folder that passed `check_folder`, and the model that it holds."""

    path: Path
    config: Dict[str, Any]
    card: ModelCard
    model: nn.Module


def _model_card(name: str, result: Score, data: str, license: str, details: dict, reproduce: str) -> str:
    task = 'image-classification'
    scores = {'Top-1 accuracy': result.top1, 'Top-5 accuracy': result.top5}.items()
    metadata = ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag=task,
        tags=[task, 'timm', 'timm_regnet_reg'],
        model_name=name,
        eval_results=[EvalResult(task, 'imagefolder', data, 'accuracy', x, metric_name=key) for key, x in scores],
    )
    rows = {
        'Top-1': f'{result.top1:.2f} %',
        'Top-5': f'{result.top5:.2f} %',
        'Images scored': f'{result.images:,}, in float32',
        'Data': data,
        'Classes': len(result.label_names),
        **details,
        'Packaged with': f'PyTorch {torch.__version__}, timm {timm.__version__}, timm_regnet_reg {__version__}',
        'License of the weights': license,
    }
    table = '\n'.join(f'| {key} | {str(value).replace("|", chr(92) + "|")} |' for key, value in rows.items())
    template = Path(__file__).with_name('card.md').read_text(encoding='utf-8')
    return template.format(metadata=metadata.to_yaml(), name=name, table=table, reproduce=reproduce)


def check_replaceable(folder, overwrite: bool = False) -> None:
    """A UserError, before the work, if a place can't be written, or holds other files or a card edited by hand."""
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
    model: nn.Module, folder, data_config: dict, result: Score, data: str, license: str, details: dict, reproduce: str
) -> None:
    """Writes `config.json`, `model.safetensors` and `README.md`, checked, as a whole or not at all.

    Args:
        model: Its config forgets what it says of the weights that the network started from.
        folder: `…/{model}.{tag}`, which `check_replaceable` lets be replaced.
        data: What the images are that were scored, in words.
        details: Rows of the card's table, about the training.
        reproduce: Markdown that says how to get these weights again.
    """
    name = Path(folder).name
    model.pretrained_cfg.update(dict.fromkeys(PROVENANCE))
    cfg = {'tag': name.partition('.')[2], 'license': license}
    told = {'label_names': result.label_names, 'pretrained_cfg': cfg}
    with replacing(folder, folder=True) as new:
        save_for_hf(model, str(new), model_config=told, safe_serialization=True, data_config=data_config)
        with suppress(OSError):  # safetensors lets nobody else read its files; some mounts know no permissions
            shutil.copymode(new / CONFIG, new / WEIGHTS)
        config = json.loads((new / CONFIG).read_text(encoding='utf-8'))
        del config['model_args']['num_classes']  # which stands above, too; transformers takes no such argument
        (new / CARD).write_text(_model_card(name, result, data, license, details, reproduce), encoding='utf-8')
        config.update(sha256=file_sha256(new / WEIGHTS), card_sha256=file_sha256(new / CARD))
        (new / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        check_folder(new)


def check_folder(folder) -> Folder:
    """Checks a folder's files, the hash of the weights, card and network; a UserError names what is at fault."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f'{folder}: no such folder; expected one that `package` wrote')
    names = {*os.listdir(folder)}
    if names != {*FILES}:
        missing, foreign = (', '.join(sorted(some)) or 'nothing' for some in ({*FILES} - names, names - {*FILES}))
        raise UserError(f'{folder}: holds other files than `package` wrote; missing: {missing}; added: {foreign}')
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        expected = config['sha256']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder / CONFIG}: is not a config that `package` wrote ({error!r}); restore it') from error
    if file_sha256(folder / WEIGHTS) != expected:
        raise UserError(f'{folder / WEIGHTS}: its SHA-256 is not {expected}, which {CONFIG} names; restore the file')
    try:
        card = ModelCard.load(folder / CARD)
        if not card.data.license or not card.data.eval_results:
            raise ValueError('no license or no accuracy')
    except Exception as error:  # the client stumbles in many ways over front matter that it doesn't expect
        raise UserError(f'{folder / CARD}: not the front matter of `package` ({reason(error)}); restore it') from error
    return Folder(folder, config, card, load_model(f'local-dir:{folder}'))
