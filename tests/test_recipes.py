"""The recipes in train_recipes/, held against the papers' figures and against timm's own train.py.

train.py is not part of timm's package. The tests that need it read its path from the environment variable
TIMM_TRAIN_SCRIPT, and are skipped when that isn't set:

    git clone --depth 1 https://github.com/huggingface/pytorch-image-models
    TIMM_TRAIN_SCRIPT=$PWD/pytorch-image-models/train.py pytest tests/test_recipes.py
"""

import argparse
import copy
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs

import timm_regnet_reg  # noqa: F401  (registers the models)

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / 'train_recipes').glob('*.yaml'))}
CIFAR_MODEL = 'regnet_reg_resnet20_convlstm'

recipe_names = pytest.mark.parametrize('name', RECIPES)


def load(name):
    return yaml.safe_load(RECIPES[name].read_text())


@pytest.fixture(scope='module')
def train_script():
    path = os.environ.get('TIMM_TRAIN_SCRIPT')
    if not path:
        reason = "TIMM_TRAIN_SCRIPT is not set to the path of timm's train.py"
        print(reason)
        pytest.skip(reason)
    return Path(path)


def load_script(path):
    """A script of timm's as a module, for its parser: nothing of it runs on import."""
    spec = importlib.util.spec_from_file_location(f'timm_{path.stem}_script', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def train_parser(train_script):
    return load_script(train_script).parser


def fits(value, action):
    """Whether a YAML value is what the command line would have made of this option (argparse checks no defaults)."""
    if isinstance(action, ParseKwargs):
        return isinstance(value, dict)
    if action.nargs == 0:
        return isinstance(value, bool)
    if action.nargs in ('+', '*') or isinstance(action.nargs, int):
        lengths = (action.nargs,) if isinstance(action.nargs, int) else range(action.nargs == '+', 100)
        element = copy.copy(action)
        element.nargs = None
        return isinstance(value, list) and len(value) in lengths and all(fits(v, element) for v in value)
    if action.choices is not None and value not in action.choices:
        return False
    types = {float: (int, float), int: int, str: str, None: str}[action.type]
    return isinstance(value, types) and not isinstance(value, bool)


@recipe_names
def test_every_key_is_an_option_of_train_py_and_has_its_type(name, train_parser):
    actions = {action.dest: action for action in train_parser._actions}
    recipe = load(name)
    assert not [key for key in recipe if key not in actions]
    assert not {key: value for key, value in recipe.items() if not fits(value, actions[key])}


@pytest.mark.parametrize(
    'option, value',
    [
        ('lr', '5e-3'),  # what YAML makes of 5e-3
        ('epochs', 1.5),
        ('epochs', True),
        ('amp', 1),
        ('decay_milestones', '82 123'),
        ('decay_milestones', [82, '123']),
        ('input_size', [3, 32]),
        ('opt_kwargs', 'nesterov=True'),
        ('train_size_schedule', 'linear'),
    ],
)
def test_the_type_check_refuses(option, value, train_parser):
    action = next(action for action in train_parser._actions if action.dest == option)
    assert not fits(value, action)


def commands(name):
    """The command lines in a recipe's comments, as lists of arguments."""
    text = '\n'.join(line[1:].strip() for line in RECIPES[name].read_text().splitlines() if line.startswith('#'))
    lines = text.replace('\\\n', ' ').splitlines()
    return [shlex.split(line) for line in lines if re.match('(python|torchrun) ', line)]


@recipe_names
def test_commands_in_the_comments_name_real_models_and_options(name, train_script):
    assert commands(name)
    for command in commands(name):
        script = next(word for word in command if word in ('train.py', 'validate.py'))
        module = load_script(train_script.with_name(script))
        parser = module.parser
        args = ['10' if word == 'N' else word for word in command[command.index(script) + 1 :]]
        if script == 'train.py':
            config, args = module.config_parser.parse_known_args(args)
            assert (ROOT / config.config).samefile(RECIPES[name])
        try:
            args = parser.parse_args(args)
        except SystemExit:
            pytest.fail(f'{script} refuses: {shlex.join(command)}')
        assert timm.is_model(args.model)


@recipe_names
def test_recipe_registers_the_models(name):
    assert load(name)['device_modules'] == ['timm_regnet_reg']


def learning_rates(name, updates_per_epoch, at, **overrides):
    """Learning rate at the start of the epochs `at`, as train.py steps it, and the number of epochs in all."""
    args = argparse.Namespace(**{**load(name), **overrides})
    args.lr = args.lr_base
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        **scheduler_kwargs(args),
        updates_per_epoch=updates_per_epoch,
    )
    rates = []
    for epoch in at:
        if getattr(args, 'sched_on_updates', False):
            scheduler.step_update(epoch * updates_per_epoch)
        else:
            scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]['lr'])
    return rates, num_epochs


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_schedule_is_the_papers(name):
    """He et al., section 4.2: 64,000 updates in all, the rate divided by 10 at 32,000 and 48,000."""
    rates, num_epochs = learning_rates(name, 390, [0, 81, 82, 122, 123, 163])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert num_epochs * 390 == pytest.approx(64_000, rel=1e-2)


def test_imagenet_schedule_is_the_papers():
    rates, num_epochs = learning_rates('imagenet', 5004, [0, 29, 30, 59, 60, 89, 90, 99])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    assert num_epochs == 100


def test_short_cifar_schedule_warms_up_and_ends_at_zero():
    overrides = dict(epochs=15, sched='cosine', warmup_epochs=1, warmup_lr=0.01)
    rates, num_epochs = learning_rates('cifar10', 390, range(16), **overrides)
    assert num_epochs == 15
    assert rates[0] == pytest.approx(0.01)
    assert rates[1] > 0.098
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[15] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(
    'name, epochs, lr, weight_decay, smoothing, drop_path, repeats, aa, mixup, size',
    [
        ('imagenet_a1', 600, 5e-3, 0.01, 0.1, 0.05, 3, 'rand-m7-mstd0.5-inc1', 0.2, None),
        ('imagenet_a2', 300, 5e-3, 0.02, 0.0, 0.05, 3, 'rand-m7-mstd0.5-inc1', 0.1, None),
        ('imagenet_a3', 100, 8e-3, 0.02, 0.0, None, None, 'rand-m6-mstd0.5-inc1', 0.1, 160),
    ],
)
def test_strikes_back_recipes_hold_the_papers_figures(
    name,
    epochs,
    lr,
    weight_decay,
    smoothing,
    drop_path,
    repeats,
    aa,
    mixup,
    size,
):
    """Wightman et al. (arXiv 2110.00476), table 2."""
    recipe = load(name)
    paper = dict(
        epochs=epochs,
        lr_base=lr,
        lr_base_size=2048,
        weight_decay=weight_decay,
        smoothing=smoothing,
        drop_path=drop_path,
        aug_repeats=repeats,
        aa=aa,
        mixup=mixup,
        img_size=size,
        opt='lamb',
        sched='cosine',
        warmup_epochs=5,
        bce_loss=True,
        cutmix=1.0,
        crop_pct=0.95,
    )
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


def gray(size, value=100):
    return Image.new('RGB', (size, size), (value, value, value))


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_images_are_validated_untouched(name):
    config = resolve_data_config(load(name), model=timm.create_model(CIFAR_MODEL))
    transform = create_transform(**config, use_prefetcher=True)
    pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)
    assert torch.equal(torch.as_tensor(transform(Image.fromarray(pixels.numpy()))), pixels.permute(2, 0, 1))


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_cifar_training_views_shift_by_up_to_six_pixels_and_keep_their_colors(name):
    """The papers pad by 4 and crop: a view holds 28 or more of the 32 columns; ours, resized, 26 or more."""
    recipe = load(name)
    transform = create_transform(
        input_size=(3, 32, 32),
        is_training=True,
        scale=recipe['scale'],
        ratio=recipe['ratio'],
        hflip=recipe['hflip'],
        color_jitter=recipe['color_jitter'],
        interpolation=recipe['train_interpolation'],
        use_prefetcher=True,
    )
    assert all((torch.as_tensor(transform(gray(32))) == 100).all() for _ in range(20))

    columns = torch.arange(32, dtype=torch.uint8)[None, :, None].expand(32, 32, 3) * 8
    ramp = Image.fromarray(columns.contiguous().numpy())
    seen = [torch.as_tensor(transform(ramp)).float() / 8 for _ in range(200)]
    spans = [(view.max() - view.min()).item() + 1 for view in seen]
    assert 25 <= min(spans) < 28 and max(spans) > 31


def test_cifar_recipe_needs_nothing_but_model_and_data(train_script, tmp_path):
    """The real train.py, started as the recipe's comment says, learns an epoch of eight images."""
    for split in 'train', 'validation':
        for label in range(2):
            folder = tmp_path / split / str(label)
            folder.mkdir(parents=True)
            for index in range(4):
                gray(32, value=60 + 120 * label + index).save(folder / f'{index}.png')
    result = subprocess.run(
        [
            sys.executable,
            str(train_script),
            '--config',
            str(RECIPES['cifar10']),
            '--model',
            CIFAR_MODEL,
            '--data-dir',
            str(tmp_path),
            # for the sake of the test's machine
            '--device',
            'cpu',
            '--workers',
            '0',
            '--batch-size',
            '4',
            '--epochs',
            '1',
            '--output',
            str(tmp_path / 'out'),
        ],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob('out/*/last.pth.tar'))
