"""The recipes in train_recipes/, held against the papers' figures and against timm's own train.py.

train.py is not part of timm's package. What its parser knows is in train_options.json. The tests that run train.py, or
compare that file with it, are skipped unless the environment variable TIMM_TRAIN_SCRIPT is its path:

    git clone --depth 1 https://github.com/huggingface/pytorch-image-models
    TIMM_TRAIN_SCRIPT=$PWD/pytorch-image-models/train.py pytest tests/test_recipes.py
"""

import argparse
import importlib.util
import json
import math
import os
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.utils import ParseKwargs

import timm_regnet_reg  # noqa: F401  (registers the models)
from timm_regnet_reg.papers.resident import learning_rates

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / 'train_recipes').glob('*.yaml'))}
CIFAR_MODEL = 'regnet_reg_resnet20_convlstm'

recipe_names = pytest.mark.parametrize('name', RECIPES)


def load(name):
    return yaml.safe_load(RECIPES[name].read_text())


OPTIONS = ROOT / 'tests' / 'train_options.json'


def load_script(path):
    """A script of timm's as a module, for its parser: nothing of it runs on import."""
    spec = importlib.util.spec_from_file_location(f'timm_{path.stem}_script', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(train_script):
    """What the parsers of train.py and validate.py know, by script and flags, as data."""
    options = {'timm': re.search("'(.*)'", (train_script.parent / 'timm' / 'version.py').read_text())[1]}
    for name in 'train.py', 'validate.py':
        module = load_script(train_script.with_name(name))
        actions = [action for action in module.parser._actions if action.dest != 'help']
        actions += module.config_parser._actions if name == 'train.py' else []
        options[name] = {}
        for action in actions:
            option = {
                'dest': action.dest,
                'type': action.type and action.type.__name__,
                'nargs': 'ParseKwargs' if isinstance(action, ParseKwargs) else action.nargs,
                'choices': action.choices and list(action.choices),
            }
            flags = ' '.join(action.option_strings) or action.dest
            options[name][flags] = {key: value for key, value in option.items() if value is not None}
    return options


def create_parser(options):
    parser = argparse.ArgumentParser()
    for flags, option in options.items():
        kwargs = {**option, 'type': {'int': int, 'float': float}.get(option.get('type'), str)}
        if not flags.startswith('-'):
            del kwargs['dest']
        if option.get('nargs') == 'ParseKwargs':
            kwargs.update(nargs='*', action=ParseKwargs)
        elif option.get('nargs') == 0:
            kwargs = dict(dest=option['dest'], action='store_true')
        parser.add_argument(*flags.split(), **kwargs)
    return parser


@pytest.fixture(scope='module')
def train_script():
    if 'TIMM_TRAIN_SCRIPT' not in os.environ:
        pytest.skip("TIMM_TRAIN_SCRIPT is not set to the path of timm's train.py")
    return Path(os.environ['TIMM_TRAIN_SCRIPT'])


@pytest.fixture(scope='module')
def parsers():
    """Parsers that know what those of the scripts know."""
    options = json.loads(OPTIONS.read_text())
    return {name: create_parser(options[name]) for name in ('train.py', 'validate.py')}


def test_options_are_those_of_timms_scripts(train_script):
    known, real = json.loads(OPTIONS.read_text()), describe(train_script)
    for name in 'train.py', 'validate.py':  # scripts of another version may know more
        changed = {flags: real[name].get(flags) for flags in known[name] if real[name].get(flags) != known[name][flags]}
        assert not changed, f'of timm {real["timm"]}; python tests/test_recipes.py {train_script} rewrites {OPTIONS}'


def words(action, value):
    """An option as the command line has it that sets argparse's `action` to this value."""
    values = value if isinstance(value, list) else [value]
    if isinstance(value, dict):
        values = [f'{key}={item}' for key, item in value.items()]
    return [action.option_strings[-1], *([] if action.nargs == 0 else map(str, values))]


@recipe_names
def test_every_key_is_an_option_of_train_py_and_has_its_type(name, parsers):
    """Argparse checks no defaults, which a recipe's values are; YAML takes 5e-3 for text."""
    actions = {action.dest: action for action in parsers['train.py']._actions}
    recipe = load(name)
    assert not [key for key in recipe if key not in actions]
    args = parsers['train.py'].parse_args(sum((words(actions[key], value) for key, value in recipe.items()), []))
    assert {key: getattr(args, key) for key in recipe} == recipe
    assert recipe['device_modules'] == ['timm_regnet_reg']  # which registers the models


def commands(name):
    """The command lines in a recipe's comments, as lists of arguments."""
    text = '\n'.join(line[1:].strip() for line in RECIPES[name].read_text().splitlines() if line.startswith('#'))
    lines = text.replace('\\\n', ' ').splitlines()
    return [shlex.split(line) for line in lines if re.match('(python|torchrun) ', line)]


@recipe_names
def test_commands_in_the_comments_name_real_models_and_options(name, parsers):
    assert commands(name)
    for command in commands(name):
        script = next(word for word in command if word in parsers)
        given = ['10' if word == 'N' else word for word in command[command.index(script) + 1 :]]
        args = parsers[script].parse_args(given)
        if script == 'train.py':
            assert (ROOT / args.config).samefile(RECIPES[name])
        assert timm.is_model(args.model)


def steps(*milestones, early=0):
    """Divided by ten at these epochs."""
    return lambda update, epochs: 10.0 ** -sum(update >= 390 * milestone - early for milestone in milestones)


def cosine(update, epochs):
    """timm's: warm-up from a tenth in the first epoch, and cosine to 0 over all epochs."""
    return 0.1 + 0.9 * update / 390 if update < 390 else (1 + math.cos(math.pi * update / (390 * epochs))) / 2


@pytest.mark.parametrize(
    'name, epochs, factor',
    [
        ('imagenet', 100, steps(30, 60, 90)),
        ('cifar10', 164, steps(82, 123, early=1)),  # timm's multistep, by updates
        ('cifar100', 164, steps(82, 123, early=1)),
        ('cifar10_short', 30, cosine),
        ('cifar10_strong', 200, cosine),
    ],
)
def test_learning_rate_of_every_update_is_the_papers(name, epochs, factor):
    """As `reproduce` has it from timm; that train.py has it so is in test_resident.py."""
    recipe = load(name)
    rate = 0.1 * recipe['batch_size'] / recipe['lr_base_size']
    expected = [rate * factor(update, epochs) for update in range(390 * epochs)]
    assert learning_rates(recipe, updates_per_epoch=390) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    'name, figures',
    [
        ('imagenet_a1', dict(epochs=600, lr_base=5e-3, weight_decay=0.01, smoothing=0.1, mixup=0.2, aug_repeats=3)),
        ('imagenet_a2', dict(epochs=300, lr_base=5e-3, weight_decay=0.02, smoothing=0.0, mixup=0.1, aug_repeats=3)),
        ('imagenet_a3', dict(epochs=100, lr_base=8e-3, weight_decay=0.02, smoothing=0.0, mixup=0.1, img_size=160)),
    ],
)
def test_strikes_back_recipes_hold_the_papers_figures(name, figures):
    """Wightman et al. (arXiv 2110.00476), table 2."""
    recipe, short = load(name), name == 'imagenet_a3'
    augment = dict(aa=f'rand-m{6 if short else 7}-mstd0.5-inc1', drop_path=None if short else 0.05, cutmix=1.0)
    common = dict(lr_base_size=2048, opt='lamb', sched='cosine', warmup_epochs=5, bce_loss=True)
    paper = {**dict.fromkeys(('aug_repeats', 'img_size')), **figures, **augment, **common}
    assert {key: recipe.get(key) for key in paper} == paper
    assert recipe['batch_size'] * 8 == recipe['lr_base_size']


@pytest.mark.parametrize('name, decayed', [('cifar10', True), ('imagenet', True), ('imagenet_a1', False)])
def test_weight_decay_covers_what_the_paper_says(name, decayed):
    """The SGD papers decay every parameter; LAMB's recipes spare biases and norms, as timm does."""
    args = argparse.Namespace(**{'momentum': 0.9, **load(name)}, lr=0.1)
    model = timm.create_model(CIFAR_MODEL)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **getattr(args, 'opt_kwargs', {}))
    decays = {group['weight_decay'] for group in optimizer.param_groups}
    assert decays == ({args.weight_decay} if decayed else {args.weight_decay, 0.0})


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_training_views_are_windows_of_the_padded_image_bit_for_bit(name):
    """He et al., section 4.2: 4 pixels padded on each side, and a 32x32 crop of it. All 81 are seen."""
    recipe = load(name)
    options = {key: recipe[key] for key in ('scale', 'ratio', 'color_jitter')}
    options.update(hflip=0.0, interpolation=recipe['train_interpolation'], use_prefetcher=True)
    transform = create_transform((3, 32, 32), is_training=True, **options)
    random.seed(0)
    padded = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
    places = [(top, left) for top in range(9) for left in range(9)]
    windows = {padded[top : top + 32, left : left + 32].tobytes(): (top, left) for top, left in places}
    views = (torch.as_tensor(transform(Image.fromarray(padded))) for _ in range(1500))
    seen = [windows.get(view.permute(1, 2, 0).numpy().tobytes()) for view in views]
    assert None not in seen and {*seen} == {*places}


def test_cifar100_is_normalised_by_its_own_mean_and_std():
    """Those of cifar10.yaml are the models' own, CIFAR-10's."""
    models = resolve_data_config(load('cifar10'), model=timm.create_model(CIFAR_MODEL))
    own = resolve_data_config(load('cifar100'), model=timm.create_model(CIFAR_MODEL))
    assert models['mean'] == (0.4914, 0.4822, 0.4465)
    assert own['mean'] == (0.5071, 0.4865, 0.4409) and own['std'] == (0.2673, 0.2564, 0.2762)


if __name__ == '__main__':
    described = describe(Path(sys.argv[1]).resolve())
    lines = []
    for script in 'train.py', 'validate.py':
        options = [f'  {json.dumps(flags)}: {json.dumps(option)}' for flags, option in described[script].items()]
        lines.append(f' "{script}": {{\n' + ',\n'.join(options) + '\n }')
    OPTIONS.write_text(f'{{\n "timm": "{described["timm"]}",\n' + ',\n'.join(lines) + '\n}\n')
