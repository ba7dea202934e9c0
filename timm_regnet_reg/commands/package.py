"""Turn a checkpoint of train.py into a folder that timm and the Hub load.

The folder `{output}/{model}.{tag}/` holds what a Hub repository of the network holds: `config.json` (timm's format,
with label names and the weights' SHA-256), `model.safetensors` and `README.md` (the model card). The weights are
scored on the data's validation split on the way, and the score goes into the card, with the options of train.py that
the recipe names. An earlier folder is replaced, but one whose card was edited by hand only with --overwrite.
"""

import argparse
import inspect
import re
from pathlib import Path
from typing import Any, Dict, Tuple

import timm
import torch
import yaml
from timm.data import resolve_input_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models import clean_state_dict
from timm.models._input import get_model_args
from timm.utils import load_checkpoint_metadata

from ..arguments import add_data, add_device, count, positive, words
from ..blocks import split_fusions
from ..errors import UserError, reason
from ..papers.resident import read_recipe
from ..papers.results import scheduled_epochs
from ..pretrained import check_weights
from ..weights.folder import check_replaceable, save_folder
from ..weights.inference import try_image
from ..weights.scoring import ImageFolder, check_device, check_same_classes, score, split_folder


def _read_checkpoint(path: str, use_ema: bool) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any], str]:
    """State dict, arguments and epochs ('3 of 3') of a checkpoint of train.py; nothing in it is executed."""
    try:
        checkpoint = load_checkpoint_metadata(path)
        ema = checkpoint.get('state_dict_ema')
        weights = clean_state_dict(ema if use_ema and ema else checkpoint['state_dict'])
        # --split-bn's auxiliary norms serve training alone
        state_dict = {key: value for key, value in weights.items() if '.aux_bn.' not in key}
        train_args = {**vars(checkpoint['args']), 'by_reproduce': 'momenta' in checkpoint}
        train_args['model_kwargs'] = train_args.get('model_kwargs') or {}
        epochs = f'{int(checkpoint["epoch"]) + 1} of {scheduled_epochs(train_args)}'
    except Exception as error:  # torch raises whatever it stumbles over
        raise UserError(
            f"{path}: cannot be read as a checkpoint of train.py, with 'state_dict', 'args' and 'epoch' "
            f'({reason(error).splitlines()[0]}); it is missing, damaged, of another kind, or holds Python objects, '
            'which could run code. Take another checkpoint of the same run'
        ) from error
    if use_ema and not ema:
        raise UserError(f'{path}: holds no EMA weights; train with --model-ema, or leave --use-ema out')
    return state_dict, train_args, epochs


def _recipe(path: str, model: torch.nn.Module, train_args: Dict[str, Any]) -> Tuple[str, str]:
    """The recipe's name with what the run changed in it, and Markdown that says how to run it again."""
    recipe, name = read_recipe(path), Path(path).name
    # what options of their own say is not said twice
    arguments = {k: v for k, v in get_model_args(model).items() if k not in ('num_classes', 'in_chans', 'global_pool')}
    architecture, given = model.pretrained_cfg['architecture'], str(train_args.get('model'))
    name_of_run = given if given.split('.')[0] == architecture else architecture  # with the tag of what it started from
    # which train.py takes as options of its own
    drops = {k.removesuffix('_rate'): v for k, v in train_args['model_kwargs'].items() if k.startswith('drop_')}
    run = {**train_args, 'model': name_of_run, 'model_kwargs': arguments, **drops}
    changed = [f'{key} {run.get(key)} instead of {value}' for key, value in recipe.items() if run.get(key) != value]
    keys = (*recipe, 'model', 'num_classes', 'model_kwargs', 'seed', 'epochs', 'lr', 'amp', 'amp_dtype', *drops)
    options = {key: run[key] for key in keys if run.get(key) not in (None, {})}
    processes = train_args.get('world_size', 1)
    launch = 'python' if processes == 1 else f'torchrun --nproc_per_node={processes}'
    how = (
        f"Save these options as `args.yaml`, then run timm's own script, on data as `{name}` wants it: "
        f'`{launch} train.py --config args.yaml --data-dir DIR`. They are those that `{name}` names, as the run had '
        'them; what else its command line said is not here.'
    )
    if ':' in given:
        how += ' The run started from the network of a folder or repository.'
    if train_args['by_reproduce']:
        how += ' The run was one of `regnet-reg reproduce`, which repeats it; `train.py` draws other crops and flips.'
    if train_args.get('resume'):
        how += ' It was stopped and resumed, so that these options repeat it, but not exactly.'
    told = f'{name} with {", ".join(changed)}' if changed else name
    return told, f'{how}\n\n```yaml\n{yaml.safe_dump(options, default_flow_style=None)}```'


def _build(name: str, train_args: Dict[str, Any], state_dict: Dict[str, torch.Tensor]) -> torch.nn.Module:
    """The network that train.py made: from the source that it was given or, if that is gone, from its name."""
    given = {
        'num_classes': train_args.get('num_classes'),
        'in_chans': train_args.get('in_chans') or (train_args.get('input_size') or [None])[0],
        'global_pool': train_args.get('gp'),
        'bn_eps': train_args.get('bn_eps'),
        **train_args['model_kwargs'],
    }
    how_made = inspect.signature(timm.create_model).parameters  # and not what the network is
    model_args = {key: value for key, value in given.items() if key not in how_made and value is not None}
    source = str(train_args.get('model'))
    if source != name:
        try:
            return timm.create_model(source, **model_args)
        except Exception as error:  # timm and the Hub's client raise errors of their own
            print(f'{source}, where the run started, cannot be read ({reason(error)}): its weights must fit {name}')
        stages = sorted({int(key[5]) for key in state_dict if re.match(r'layer\d\.regulator\.', key)})
        if stages and name.startswith('regnet_reg'):
            model_args.setdefault('regulated_stages', stages)
        model_args['pretrained_cfg_overlay'] = {'license': None}  # that of the source isn't known
    return timm.create_model(name, **model_args)


def _license(model: torch.nn.Module, train_args: Dict[str, Any]) -> str:
    """That of the weights that the training started from, or apache-2.0; a UserError if it isn't known."""
    own_file = train_args.get('initial_checkpoint') or train_args.get('pretrained_path')
    if not (own_file or train_args.get('pretrained') or train_args['model_kwargs'].get('pretrained')):
        return 'apache-2.0'
    license = None if own_file else model.pretrained_cfg.get('license')
    if not license:
        start = own_file or train_args['model']
        raise UserError(f'the license of {start}, where the training started, is not known; give one by --license')
    return str(license)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a checkpoint of train.py (model_best.pth.tar, say)')
    parser.add_argument('--model', required=True, help='the architecture that was trained')
    parser.add_argument('--tag', required=True, help='name of these weights, letters, digits and "_" (cifar10, say)')
    add_data(parser)
    parser.add_argument('--data-name', required=True, type=words, metavar='TEXT', help='what the images are, in words')
    parser.add_argument('--recipe', required=True, metavar='YAML', help='the file that train.py ran with (--config)')
    parser.add_argument('--use-ema', action='store_true', help='take the EMA weights')
    parser.add_argument(
        '--license', type=words, help='of the weights (default: that of the weights they started from, or apache-2.0)'
    )
    parser.add_argument('--output', default='.', metavar='DIR', help='where {model}.{tag}/ goes (default: here)')
    parser.add_argument('--overwrite', action='store_true', help='replace a README.md that was edited by hand, too')
    parser.add_argument('--batch-size', type=positive, default=128, metavar='N', help='to score (default: %(default)s)')
    parser.add_argument('--workers', type=count, default=2, metavar='N', help='loader processes (default: %(default)s)')
    add_device(parser)


def main(args: argparse.Namespace) -> None:
    if not re.fullmatch('[A-Za-z0-9_]{1,64}', args.tag):
        raise UserError(f'--tag {args.tag}: expected letters, digits and "_" only, 64 at most, such as cifar10')
    device = check_device(args.device)
    output = Path(args.output, f'{args.model}.{args.tag}')
    check_replaceable(output, args.overwrite)
    root = split_folder(args.data_dir, args.split)
    state_dict, train_args, epochs = _read_checkpoint(args.checkpoint, args.use_ema)
    if class_map := train_args.get('class_map'):
        told = f"train.py numbered the classes by --class-map {class_map}, and not by their folders' order"
        raise UserError(f'{args.checkpoint}: {told}; such a network can only be saved by timm (save_for_hf)')
    try:
        model = _build(args.model, train_args, state_dict).eval()
        if (architecture := model.pretrained_cfg['architecture']) != args.model:
            raise UserError(f'it is a checkpoint of {architecture}; give one of {args.model}, or that --model')
        split_fusions(state_dict)
        check_weights(state_dict, model)
        model.load_state_dict(state_dict)
        data_config = resolve_input_data_config(model, train_args)
    except Exception as error:  # whatever networks, torch and timm make of wrong arguments
        raise UserError(f'{args.checkpoint}: does not fit --model {args.model}: {reason(error)}') from error
    license = args.license or _license(model, train_args)
    try_image(model, data_config, args.checkpoint)
    recipe, reproduce = _recipe(args.recipe, model, train_args)
    images = ImageFolder(root, data_config, model.num_classes)
    training = Path(args.data_dir, str(train_args.get('train_split') or 'train'))
    check_same_classes(images, [*find_images_and_targets(str(training), sort=False)[1]], training)
    result = score(model.to(device), images, data_config, args.batch_size, args.workers)

    details = {
        'Recipe': recipe,
        'Epochs': epochs,
        # train.py knows no other arguments than those that it was started with last
        'Seed': f'{train_args.get("seed")}{" after the last resumption" if train_args.get("resume") else ""}',
        'Weights': 'exponential moving average (EMA)' if args.use_ema else 'as trained, not averaged',
        'Parameters': f'{sum(p.numel() for p in model.parameters()):,}',
        'Input': '{input_size}, {interpolation}, {crop_mode} crop of {crop_pct}'.format(**data_config),
    }
    save_folder(model, output, data_config, result, args.data_name, license, details, reproduce)
    print(f'{output}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % on {result.images:,} images')
