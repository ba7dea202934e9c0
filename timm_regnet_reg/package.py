"""Turn a checkpoint of train.py into a folder that timm and the Hub load.

The folder `{output}/{model}.{tag}/` is byte for byte the Hub repository it can become: `config.json` (timm's format,
with label names and the weights' SHA-256), `model.safetensors` and `README.md` (the model card). The weights are
scored on the data's validation split on the way, and the score goes into the card.
"""
import argparse
import json
import os
import pickle
import platform
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import SafetensorError
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import clean_state_dict, is_model, save_for_hf
from timm.utils import AverageMeter, accuracy
from tqdm import tqdm

from . import __version__
from .errors import UserError
from .pretrained import file_sha256

__all__ = ['FILES', 'Folder', 'Score', 'check_folder', 'model_card', 'save_folder', 'score']

CONFIG, WEIGHTS, CARD = FILES = ('config.json', 'model.safetensors', 'README.md')
TOP1, TOP5 = 'Top-1 accuracy', 'Top-5 accuracy'
PICKLES = ('.bin', '.pth', '.pt', '.pkl', '.pickle', '.ckpt', '.tar', '.npy', '.npz')

# Arguments of train.py that say where and on what machine it ran, not what it did.
_PLACES = {
    'data', 'data_dir', 'output', 'experiment', 'resume', 'device', 'distributed', 'world_size', 'rank', 'local_rank',
    'prefetcher', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
}

# What a pretrained_cfg says of somebody else's weights; a new checkpoint inherits none of it.
_PROVENANCE = (
    'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'source', 'description', 'origin_url', 'paper_name', 'paper_ids',
    'notes', 'label_names', 'label_descriptions', 'label_offset',
)


class Score(NamedTuple):
    """Accuracies in percent, the number of images they were measured on, and the class names in label order."""
    top1: float
    top5: float
    images: int
    label_names: List[str]


class Folder(NamedTuple):
    """A folder that passed `check_folder`, and the model that it holds (in evaluation mode, on the CPU)."""
    path: Path
    config: Dict[str, Any]
    card: ModelCard
    model: torch.nn.Module


def read_checkpoint(path: str, use_ema: bool = False) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any], int]:
    """Reads a checkpoint of train.py, tensors and plain values only: nothing in it is executed.

    Returns:
        The state dict, the arguments of train.py, and the number of epochs trained.

    Raises:
        UserError: The file is missing, damaged, of another kind, holds other objects, or lacks the EMA weights.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path}: no such file; give a checkpoint that train.py wrote (model_best.pth.tar, say)')
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py's own arguments
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and 'GLOBAL' in str(error):
            raise UserError(
                f'{path}: holds Python objects that could run code when loaded, so it was not loaded. Expected a '
                'checkpoint as train.py writes it: tensors, plain values, and its arguments.'
            ) from error
        raise UserError(
            f'{path}: cannot be read as a checkpoint ({type(error).__name__}); it is truncated, damaged, or of another '
            'kind. Copy it again, or take another checkpoint of the same run (last.pth.tar, checkpoint-N.pth.tar).'
        ) from error
    if not isinstance(checkpoint, dict) or not {'state_dict', 'args', 'epoch'} <= checkpoint.keys():
        found = ', '.join(map(str, list(checkpoint)[:6])) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise UserError(
            f"{path}: is not a checkpoint of train.py, which holds 'state_dict', 'args' and 'epoch'; found: {found}"
        )
    key = 'state_dict_ema' if use_ema else 'state_dict'
    if key not in checkpoint:
        raise UserError(f'{path}: holds no EMA weights; train with --model-ema, or leave --use-ema out')
    return clean_state_dict(checkpoint[key]), vars(checkpoint['args']), checkpoint['epoch'] + 1


def load_strictly(model: torch.nn.Module, state_dict: Dict[str, torch.Tensor], source) -> None:
    """Loads weights that must fit exactly and be finite; `source` is the file to name in a UserError."""
    own = model.state_dict()
    other = 'give the model, and its arguments, that these weights were trained with'
    for keys, problem, remedy in (
        ([k for k in own if k not in state_dict], 'missing', other),
        ([k for k in state_dict if k not in own], 'unexpected', other),
        ([
            f'{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}'
            for k, v in state_dict.items() if k in own and v.shape != own[k].shape
        ], 'of another shape', other),
        (
            [k for k, v in state_dict.items() if not torch.isfinite(v).all()],
            'not finite (NaN or infinite)',
            'take a checkpoint from before the training diverged',
        ),
    ):
        if keys:
            more = f' and {len(keys) - 3} more' if len(keys) > 3 else ''
            raise UserError(
                f"{source}: not the weights of {model.pretrained_cfg['architecture']}, {len(keys)} of them {problem}: "
                f"{', '.join(keys[:3])}{more}; {remedy}"
            )
    model.load_state_dict(state_dict)


def score(
        model: torch.nn.Module,
        data_dir: str,
        data_config: Dict[str, Any],
        split: str = 'validation',
        batch_size: int = 128,
        workers: int = 2,
        device: str = 'cpu',
) -> Score:
    """Accuracy on `{data_dir}/{split}/<class>/*`, with timm's loader and a progress bar on stderr.

    Args:
        data_config: Input size, mean, std, interpolation and crop, as `timm.data.resolve_data_config` gives them.

    Raises:
        UserError: There is no such folder, it holds no images, or as many classes as the model tells apart.
    """
    root = Path(data_dir, split)
    if not root.is_dir():
        raise UserError(f'{root}: no such folder; expected the images as {root}/<class>/<image>')
    mode = 'RGB' if data_config['input_size'][0] == 3 else 'L'
    try:
        dataset = create_dataset('', root=str(root), split=split, search_split=False, input_img_mode=mode)
    except RuntimeError as error:
        raise UserError(f'{root}: holds no images; expected {root}/<class>/<image>. {error}') from error
    label_names = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
    if len(label_names) != model.num_classes:
        raise UserError(
            f'{root}: holds {len(label_names)} classes ({", ".join(label_names[:4])}, …), but the model tells '
            f'{model.num_classes} apart; give the data that it was trained on'
        )
    loader = create_loader(
        dataset,
        **data_config,
        batch_size=batch_size,
        num_workers=workers,
        use_prefetcher=False,
        device=torch.device(device),
    )
    top1, top5 = AverageMeter(), AverageMeter()
    model.to(device).eval()
    with torch.inference_mode():
        for images, labels in tqdm(loader, desc='scoring', unit='batch'):
            acc1, acc5 = accuracy(model(images.to(device)), labels.to(device), topk=(1, 5))
            top1.update(acc1.item(), len(images))
            top5.update(acc5.item(), len(images))
    model.cpu()
    return Score(round(top1.avg, 3), round(top5.avg, 3), top1.count, label_names)


def model_card(name: str, result: Score, data: str, license: str, details: Dict[str, Any], reproduce: str) -> str:
    """The text of README.md.

    Args:
        name: `{model}.{tag}`.
        data: What the images are, in words.
        details: The rows of the table about the training, and anything else the reader must know.
        reproduce: Markdown that says how to get these weights again.
    """
    common = dict(
        task_type='image-classification', dataset_type='imagefolder', dataset_name=data, metric_type='accuracy')
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
        'Images scored': f'{result.images:,}',
        'Data': data,
        'Classes': len(result.label_names),
        **details,
        'Packaged with': f'Python {platform.python_version()}, PyTorch {torch.__version__}, timm {timm.__version__}, '
                         f'timm_regnet_reg {__version__}',
        'License of the weights': license,
    }
    table = '\n'.join(f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items())
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


def _recipe(path: str, train_args: Dict[str, Any]) -> Tuple[str, str]:
    """The recipe's name with what the run changed in it, and Markdown that says how to run it again."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding='utf-8'))
        if not isinstance(recipe, dict):
            raise ValueError('not a mapping of options to values')
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{path}: cannot be read as a recipe; give the YAML file that train.py ran with: {error}')
    changed = [
        f'{key} {train_args.get(key)} instead of {value}'
        for key, value in recipe.items() if key not in _PLACES and train_args.get(key) != value
    ]
    name = Path(path).name + (f" with {', '.join(changed)}" if changed else '')
    # train.py's own defaults cannot be told from here, so every option that is set is written down.
    options = {
        key: value for key, value in sorted(train_args.items())
        if key not in _PLACES and value is not None and value is not False and value not in ('', [], {})
    }
    processes = train_args.get('world_size', 1)
    launch = 'python' if processes == 1 else f'torchrun --nproc_per_node={processes}'
    return name, (
        f'Save these options as `args.yaml`, then run timm\'s own script: `{launch} train.py --config args.yaml '
        f'--data-dir DIR`.\n\n```yaml\n{yaml.safe_dump(options, default_flow_style=None)}```'
    )


def save_folder(
        model: torch.nn.Module,
        folder,
        tag: str,
        card: str,
        label_names: List[str],
        license: str,
        data_config: Optional[Dict[str, Any]] = None,
) -> Path:
    """Writes `config.json`, `model.safetensors` and `README.md` as a whole or not at all.

    Everything is written and checked in a folder beside the target, which then takes the target's name; an earlier
    folder of that name steps aside first and comes back if that fails.

    Args:
        card: The text of README.md, as `model_card` makes it.
        data_config: Input size, mean, std, interpolation and crop to record; by default the model's own.

    Raises:
        UserError: The disk is full or not writable, or the target holds files that are not of this kind.
    """
    folder = Path(folder).absolute()
    temporary, previous = (folder.with_name(f'.{folder.name}.{os.getpid()}.{end}') for end in ('new', 'old'))
    if folder.exists():
        foreign = sorted({path.name for path in folder.iterdir()} - {*FILES}) if folder.is_dir() else ['it is a file']
        if foreign:
            raise UserError(f'{folder}: not replaced, for it is more than a model ({", ".join(foreign)}); move it away')
    try:
        save_for_hf(
            model,
            str(temporary),
            model_config={'label_names': label_names, 'pretrained_cfg': {'tag': tag, 'license': license}},
            safe_serialization=True,
            data_config=data_config,
        )
        shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # safetensors lets nobody else read its files
        config = json.loads((temporary / CONFIG).read_text(encoding='utf-8'))
        config['sha256'] = file_sha256(temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        (temporary / CARD).write_text(card, encoding='utf-8')
        check_folder(temporary)
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        if folder.exists():
            os.rename(folder, previous)
        try:
            os.rename(temporary, folder)
            _sync(folder.parent)
        except BaseException:
            if folder.exists():
                os.rename(folder, temporary)
            if previous.exists():
                os.rename(previous, folder)
            raise
    except (OSError, SafetensorError) as error:
        state = 'The folder that was there is unchanged' if folder.exists() else 'Nothing half written was left behind'
        raise UserError(
            f'{folder}: could not be written ({error}). {state}; free some space there or give another --output.'
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
    return folder


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
        architecture, sha256 = config['architecture'], config['sha256']
        labels, classes = config['label_names'], config['num_classes']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{folder / CONFIG}: is not a config that `package` wrote ({error!r}); {again}') from error
    if not is_model(architecture):
        raise UserError(
            f'{folder / CONFIG}: names the architecture {architecture!r}, which is not registered in timm; '
            'install the package that has it, or correct the name'
        )
    if len(labels) != classes:
        raise UserError(f'{folder / CONFIG}: names {len(labels)} labels for {classes} classes; {again}')
    found = file_sha256(folder / WEIGHTS)
    if found != sha256:
        raise UserError(
            f'{folder / WEIGHTS}: is truncated, damaged or of another model: its SHA-256 is {found}, {CONFIG} says '
            f'{sha256}; {again}'
        )
    try:
        model = timm.create_model(f'local-dir:{folder}').eval()
    except Exception as error:  # whatever the architecture's constructor makes of wrong arguments
        raise UserError(f'{folder / CONFIG}: {architecture} cannot be built from it ({error}); {again}') from error
    try:
        state_dict = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder / WEIGHTS}: is not a safetensors file ({error}); {again}') from error
    load_strictly(model, state_dict, folder / WEIGHTS)
    return Folder(folder, config, _read_card(folder / CARD), model)


def _read_card(path: Path) -> ModelCard:
    try:
        card = ModelCard.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{path}: its front matter cannot be read ({error}); run `package` again') from error
    missing = [] if card.data.license else ['license']
    if TOP1 not in [result.metric_name for result in card.data.eval_results or []]:
        missing.append(f'model-index with "{TOP1}"')
    if missing:
        raise UserError(f'{path}: its front matter lacks {" and ".join(missing)}; run `package` again')
    return card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a checkpoint of train.py (model_best.pth.tar, say)')
    parser.add_argument('--model', required=True, help='the architecture that was trained')
    parser.add_argument('--tag', required=True, help='name of these weights, letters, digits and "_" (cifar10, say)')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='holds {split}/<class>/<image>')
    parser.add_argument('--data-name', required=True, metavar='TEXT', help='what those images are, for the model card')
    parser.add_argument('--recipe', required=True, metavar='YAML', help='the file that train.py ran with (--config)')
    parser.add_argument('--split', default='validation', help='folder of the images to score (default: %(default)s)')
    parser.add_argument('--use-ema', action='store_true', help='take the EMA weights')
    parser.add_argument('--license', default='apache-2.0', help='license of the weights (default: %(default)s)')
    parser.add_argument('--output', default='.', metavar='DIR', help='where {model}.{tag}/ goes (default: here)')
    parser.add_argument('--batch-size', type=int, default=128, metavar='N', help='for scoring (default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, metavar='N', help='loader processes (default: %(default)s)')
    parser.add_argument('--device', default='cpu', help='for scoring (default: %(default)s)')


def main(args: argparse.Namespace) -> None:
    if not is_model(args.model):
        raise UserError(f'--model {args.model}: is not registered in timm; timm.list_models() names those that are')
    if not args.tag.replace('_', '').isalnum():
        raise UserError(f'--tag {args.tag}: expected letters, digits and "_" only, such as cifar10')
    state_dict, train_args, epochs = read_checkpoint(args.checkpoint, args.use_ema)
    trained = str(train_args.get('model')).split('/')[-1].split('.')[0]
    if trained != args.model:
        raise UserError(f'{args.checkpoint}: is a checkpoint of {trained}, not of --model {args.model}; give one of it')
    recipe, reproduce = _recipe(args.recipe, train_args)

    # The arguments that train.py gave the model, as far as they outlive the training.
    model = timm.create_model(
        args.model,
        pretrained_cfg_overlay={**dict.fromkeys(_PROVENANCE), 'custom_load': False},
        num_classes=train_args.get('num_classes'),
        in_chans=train_args.get('in_chans') or (train_args.get('input_size') or [None])[0],
        global_pool=train_args.get('gp'),
        bn_eps=train_args.get('bn_eps'),
        **train_args.get('model_kwargs') or {},
    )
    load_strictly(model, state_dict, args.checkpoint)
    data_config = resolve_data_config(train_args, model=model)
    result = score(model, args.data_dir, data_config, args.split, args.batch_size, args.workers, args.device)

    details = {
        'Recipe': recipe,
        'Epochs': f"{epochs} of {train_args.get('epochs')}",
        'Seed': train_args.get('seed'),
        'Weights': 'exponential moving average (EMA)' if args.use_ema else 'last of the epoch',
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'Input': f"{' x '.join(map(str, data_config['input_size']))}, {data_config['interpolation']}, "
                 f"{data_config['crop_mode']} crop of {data_config['crop_pct']}",
    }
    name = f'{args.model}.{args.tag}'
    folder = save_folder(
        model,
        Path(args.output, name),
        tag=args.tag,
        card=model_card(name, result, args.data_name, args.license, details, reproduce),
        label_names=result.label_names,
        license=args.license,
        data_config=data_config,
    )
    print(f'{folder}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % on {result.images:,} images')
