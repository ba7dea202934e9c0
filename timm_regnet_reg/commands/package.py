"""Turn a checkpoint of train.py into a folder that timm and the Hub load.

The folder `{output}/{model}.{tag}/` is byte for byte the Hub repository it can become: `config.json` (timm's format,
with label names and the weights' SHA-256), `model.safetensors` and `README.md` (the model card). The weights are
scored on the data's validation split on the way, and the score goes into the card. An earlier folder is replaced, but
one whose card was edited by hand only with --overwrite.
"""

import argparse
import inspect
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any, Dict, Tuple

import timm
import torch
import yaml
from timm.data import resolve_input_data_config
from timm.models import clean_state_dict, is_model

from ..arguments import add_device, count, positive, words
from ..errors import UserError, reason
from ..weights.folder import check_replaceable, load_strictly, model_card, save_folder
from ..weights.scoring import ImageFolder, check_device, check_same_classes, score, try_image

AUXILIARY = 'the auxiliary norms are left out, for they serve training alone'
TAG = re.compile(r'[A-Za-z0-9_]{1,64}')

# Arguments of train.py that say on what machine it ran, not what it did.
_MACHINE = {'distributed', 'world_size', 'rank', 'local_rank', 'prefetcher', 'log_wandb'}

# Those whose text is a word that says what it did. Any other text may be a place, and stays out of the card.
_TEXTS = {
    'aa',
    'amp_dtype',
    'clip_mode',
    'crop_mode',
    'dataset',
    'device_modules',
    'dist_bn',
    'eval_metric',
    'fuser',
    'gp',
    'input_img_mode',
    'interpolation',
    'kd_distill_type',
    'kd_loss_type',
    'kd_model_name',
    'kd_token_distill_type',
    'lr_base_scale',
    'lr_noise',
    'mixup_mode',
    'model',
    'model_dtype',
    'model_kwargs',
    'naflex_loss_scale',
    'opt',
    'opt_kwargs',
    'remode',
    'sched',
    'torchcompile',
    'torchcompile_mode',
    'train_crop_mode',
    'train_interpolation',
    'train_size_schedule',
    'train_split',
    'val_split',
    'variable_batch_loss_scale',
    'worker_seeding',
}
_NAMES_WITH_SLASHES = re.compile(r'(hf-hub:|torch/)[\w.@/-]+')

# What a pretrained_cfg says of somebody else's weights; a new checkpoint inherits none of it.
_PROVENANCE = (
    'url',
    'file',
    'hf_hub_id',
    'hf_hub_filename',
    'source',
    'description',
    'origin_url',
    'paper_name',
    'paper_ids',
    'notes',
    'label_names',
    'label_descriptions',
    'label_offset',
)


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
    for name, kind, expected in (
        (key, dict, 'names and tensors'),
        ('args', argparse.Namespace, "train.py's arguments"),
        ('epoch', int, 'a whole number'),
    ):
        if not isinstance(checkpoint[name], kind):
            raise UserError(
                f'{path}: is not a checkpoint of train.py: {name!r} is of type {type(checkpoint[name]).__name__}, '
                f'expected {expected}; take another checkpoint of the same run'
            )
    for name, value in checkpoint[key].items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f'{path}: {key!r} holds {name!r}, which is no tensor; take another checkpoint of the same run'
            )
    return clean_state_dict(checkpoint[key]), dict(vars(checkpoint['args'])), checkpoint['epoch'] + 1


def _may_be_place(value: Any) -> bool:
    """Whether a value, or one in it, could be a path or an address."""
    if isinstance(value, dict):
        return any(map(_may_be_place, (*value, *value.values())))
    if isinstance(value, (list, tuple)):
        return any(map(_may_be_place, value))
    text = str(value)
    return any(mark in text for mark in ('/', '\\', '~', 'local-dir:')) and not _NAMES_WITH_SLASHES.fullmatch(text)


def _has_text(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple)):
        return any(map(_has_text, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, (bool, int, float, type(None)))


def _is_told(key: str, value: Any) -> bool:
    """Whether an option of train.py goes into the card."""
    return key not in _MACHINE and not (_has_text(value) and key not in _TEXTS or _may_be_place(value))


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
        for key, value in recipe.items()
        if train_args.get(key) != value and _is_told(key, value) and _is_told(key, train_args.get(key))
    ]
    name = Path(path).name + (f' with {", ".join(changed)}' if changed else '')
    # train.py's own defaults cannot be told from here, so every option that is set is written down.
    options = {
        key: value
        for key, value in sorted(train_args.items())
        if key not in _MACHINE and value is not None and value is not False and value not in ('', [], {})
    }
    left_out = [key for key, value in options.items() if not _is_told(key, value)]
    options = {key: value for key, value in options.items() if key not in left_out}
    processes = train_args.get('world_size', 1)
    launch = 'python' if processes == 1 else f'torchrun --nproc_per_node={processes}'
    note = f' Left out are options that may name a place: {", ".join(left_out)}.' if left_out else ''
    if train_args.get('resume'):
        note += ' The training was stopped and resumed, so that these options repeat it, but not exactly.'
    return name, (
        f"Save these options as `args.yaml`, then run timm's own script, on data as `{Path(path).name}` wants it: "
        f'`{launch} train.py --config args.yaml --data-dir DIR`.{note}\n\n'
        f'```yaml\n{yaml.safe_dump(options, default_flow_style=None)}```'
    )


def _create_model(
    name: str, train_args: Dict[str, Any], state_dict: Dict[str, torch.Tensor], source: str
) -> Tuple[torch.nn.Module, Dict[str, Any]]:
    """The network that was trained, with its weights, and how images are prepared for it."""
    try:
        # What train.py gave the model, as far as it outlives the training.
        model_args = {
            'num_classes': train_args.get('num_classes'),
            'in_chans': train_args.get('in_chans') or (train_args.get('input_size') or [None])[0],
            'global_pool': train_args.get('gp'),
            'bn_eps': train_args.get('bn_eps'),
            **(train_args.get('model_kwargs') or {}),
        }
        for key in inspect.signature(timm.create_model).parameters:  # how it was made, not what it is
            model_args.pop(key, None)
        json.dumps(model_args)  # as config.json will hold them
        model = timm.create_model(name, **model_args)
    except Exception as error:  # whatever the architecture makes of wrong arguments
        raise UserError(
            f'{source}: {name} cannot be built with the arguments that train.py had ({reason(error)}); give the '
            'checkpoint that it wrote, unchanged'
        ) from error
    model.pretrained_cfg.update(dict.fromkeys(_PROVENANCE), custom_load=False)
    load_strictly(model, state_dict, source)
    try:
        data_config = resolve_input_data_config(model, train_args)
        channels = data_config['input_size'][0]
        if channels not in (1, 3):
            raise ValueError(f'it takes {channels} channels, and images have 1 or 3')
    except (ValueError, TypeError) as error:
        raise UserError(f'{source}: its network cannot be scored on images ({reason(error)})') from error
    try_image(model.eval(), data_config, source)
    return model, data_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a checkpoint of train.py (model_best.pth.tar, say)')
    parser.add_argument('--model', required=True, help='the architecture that was trained')
    parser.add_argument('--tag', required=True, help='name of these weights, letters, digits and "_" (cifar10, say)')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='holds {split}/<class>/<image>')
    parser.add_argument(
        '--data-name', required=True, type=words, metavar='TEXT', help='what those images are, for the model card'
    )
    parser.add_argument('--recipe', required=True, metavar='YAML', help='the file that train.py ran with (--config)')
    parser.add_argument('--split', default='validation', help='folder of the images to score (default: %(default)s)')
    parser.add_argument('--use-ema', action='store_true', help='take the EMA weights')
    parser.add_argument(
        '--license', default='apache-2.0', type=words, help='license of the weights (default: %(default)s)'
    )
    parser.add_argument('--output', default='.', metavar='DIR', help='where {model}.{tag}/ goes (default: here)')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an earlier folder even if its README.md was edited by hand'
    )
    parser.add_argument(
        '--batch-size', type=positive, default=128, metavar='N', help='for scoring (default: %(default)s)'
    )
    parser.add_argument('--workers', type=count, default=2, metavar='N', help='loader processes (default: %(default)s)')
    add_device(parser)


def main(args: argparse.Namespace) -> None:
    if not is_model(args.model):
        raise UserError(f'--model {args.model}: is not registered in timm; timm.list_models() names those that are')
    if not TAG.fullmatch(args.tag):
        raise UserError(f'--tag {args.tag}: expected letters, digits and "_" only, 64 at most, such as cifar10')
    device = check_device(args.device)
    name = f'{args.model}.{args.tag}'
    output = Path(args.output, name)
    check_replaceable(output, args.overwrite)
    root = Path(args.data_dir, args.split)
    if root.resolve() == Path(args.data_dir).resolve():
        raise UserError(
            f'--split {args.split!r}: is all of {args.data_dir}, training images included; give the folder in it to '
            'score, such as validation'
        )
    state_dict, train_args, epochs = read_checkpoint(args.checkpoint, args.use_ema)
    trained = str(train_args.get('model')).split('/')[-1].split('.')[0]
    if trained != args.model:
        raise UserError(f'{args.checkpoint}: is a checkpoint of {trained}, not of --model {args.model}; give one of it')
    # a source that the run started from, a folder perhaps, was more than the architecture
    recipe, reproduce = _recipe(args.recipe, {**train_args, 'model': args.model})
    auxiliary = [key for key in state_dict if '.aux_bn.' in key]
    for key in auxiliary:
        del state_dict[key]
    model, data_config = _create_model(args.model, train_args, state_dict, args.checkpoint)
    images = ImageFolder(root, data_config, model.num_classes)
    check_same_classes(images, Path(args.data_dir, str(train_args.get('train_split') or 'train')))
    result = score(model, images, data_config, args.batch_size, args.workers, device)

    details = {
        'Recipe': recipe,
        'Epochs': f'{epochs} of {train_args.get("epochs")}',
        # train.py knows no other arguments than those that it was started with last
        'Seed': f'{train_args.get("seed")}{" after the last resumption" if train_args.get("resume") else ""}',
        'Weights': 'exponential moving average (EMA)' if args.use_ema else 'as trained, not averaged',
        **({'Split batch norm': AUXILIARY} if auxiliary else {}),
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'Input': f'{" x ".join(map(str, data_config["input_size"]))}, {data_config["interpolation"]}, '
        f'{data_config["crop_mode"]} crop of {data_config["crop_pct"]}',
    }
    folder = save_folder(
        model,
        output,
        tag=args.tag,
        card=model_card(name, result, args.data_name, args.license, details, reproduce),
        label_names=result.label_names,
        license=args.license,
        data_config=data_config,
        overwrite=args.overwrite,
    )
    print(f'{folder}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % on {result.images:,} images')
    if auxiliary:
        print(f'Split batch norm: {AUXILIARY}')
