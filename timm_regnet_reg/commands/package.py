"""Turn a checkpoint of train.py into a folder that timm and the Hub load.

The folder `{output}/{model}.{tag}/` is byte for byte the Hub repository it can become: `config.json` (timm's format,
with label names and the weights' SHA-256), `model.safetensors` and `README.md` (the model card). The weights are
scored on the data's validation split on the way, and the score goes into the card.
"""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any, Dict, Tuple

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import clean_state_dict, is_model

from ..errors import UserError
from ..support.folder import load_strictly, model_card, save_folder
from ..support.scoring import ImageFolder, check_device, score

# Arguments of train.py that say where and on what machine it ran, not what it did.
_PLACES = {
    'data',
    'data_dir',
    'output',
    'experiment',
    'resume',
    'device',
    'distributed',
    'world_size',
    'rank',
    'local_rank',
    'prefetcher',
    'log_wandb',
    'wandb_project',
    'wandb_tags',
    'wandb_resume_id',
}

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
    return clean_state_dict(checkpoint[key]), vars(checkpoint['args']), checkpoint['epoch'] + 1


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
        if key not in _PLACES and train_args.get(key) != value
    ]
    name = Path(path).name + (f' with {", ".join(changed)}' if changed else '')
    # train.py's own defaults cannot be told from here, so every option that is set is written down.
    options = {
        key: value
        for key, value in sorted(train_args.items())
        if key not in _PLACES and value is not None and value is not False and value not in ('', [], {})
    }
    processes = train_args.get('world_size', 1)
    launch = 'python' if processes == 1 else f'torchrun --nproc_per_node={processes}'
    return name, (
        f"Save these options as `args.yaml`, then run timm's own script: `{launch} train.py --config args.yaml "
        f'--data-dir DIR`.\n\n```yaml\n{yaml.safe_dump(options, default_flow_style=None)}```'
    )


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
    images = ImageFolder(Path(args.data_dir, args.split), data_config, model.num_classes)
    result = score(model, images, data_config, args.batch_size, args.workers, check_device(args.device))

    details = {
        'Recipe': recipe,
        'Epochs': f'{epochs} of {train_args.get("epochs")}',
        'Seed': train_args.get('seed'),
        'Weights': 'exponential moving average (EMA)' if args.use_ema else 'last of the epoch',
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'Input': f'{" x ".join(map(str, data_config["input_size"]))}, {data_config["interpolation"]}, '
        f'{data_config["crop_mode"]} crop of {data_config["crop_pct"]}',
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
