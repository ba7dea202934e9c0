"""Fixtures that several test files share: a local Hub, a tiny image folder, a checkpoint of train.py, its package."""

import argparse
import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import timm
import torch
from hub_server import hub  # noqa: F401, a fixture
from networks import randomize

import timm_regnet_reg  # noqa: F401, registers the models
from timm_regnet_reg.__main__ import main

torch.set_num_threads(1)  # workers of pytest-xdist would fight for the cores

MODEL = 'regnet_reg_resnet20_convlstm'
CLASSES = ('ant', 'bee', 'cat')
RECIPE = 'epochs: 3\nopt: sgd\nsmoothing: 0.0\n'


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """12 images of 32x32 random pixels in 3 classes, as {folder}/validation/<class>/*.png."""
    from PIL import Image

    folder = tmp_path_factory.mktemp('images')
    generator = torch.Generator().manual_seed(0)
    for label in CLASSES:
        path = folder / 'validation' / label
        path.mkdir(parents=True)
        for i in range(4):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path / f'{i}.png')
    return folder


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """`checkpoint`: what timm's own CheckpointSaver writes for train.py; `recipe`: a YAML file; `model`; `ema`."""
    folder = tmp_path_factory.mktemp('run')
    model, ema = (randomize(timm.create_model(MODEL, num_classes=3), seed).eval() for seed in (1, 2))
    args = argparse.Namespace(
        model=MODEL,
        num_classes=3,
        model_kwargs={},
        epochs=3,
        seed=7,
        opt='sgd',
        lr=0.1,
        smoothing=0.0,
        device='cuda:0',
        data_dir='/where/it/ran',
        world_size=1,
        device_modules=['timm_regnet_reg'],
    )
    saver = timm.utils.CheckpointSaver(
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        args=args,
        model_ema=ema,
        unwrap_fn=lambda module: module,
        checkpoint_dir=str(folder),
    )
    saver.save_checkpoint(2, metric=50.0)
    (folder / 'recipe.yaml').write_text(RECIPE)
    return SimpleNamespace(
        checkpoint=str(folder / 'model_best.pth.tar'), recipe=str(folder / 'recipe.yaml'), model=model, ema=ema
    )


@contextmanager
def full_disk(kibibytes):
    """The kernel itself refuses to let a file grow beyond that, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kibibytes * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def package_command(trained, image_folder, output, **changed):
    """The arguments of `package` for `trained`; keywords replace some."""
    options = {
        'model': MODEL,
        'tag': 'tiny',
        'data_dir': image_folder,
        'data_name': '12 images of noise',
        'recipe': trained.recipe,
        'output': output,
        'workers': 0,
        **changed,
    }
    return ['package', *(text for key, value in options.items() for text in (f'--{key.replace("_", "-")}', str(value)))]


@pytest.fixture(scope='session')
def packaged(trained, image_folder, tmp_path_factory):
    """The folder that `package` makes of `trained`. Not to be changed: copy it first."""
    output = tmp_path_factory.mktemp('packaged')
    assert main([*package_command(trained, image_folder, output), trained.checkpoint]) == 0
    return output / f'{MODEL}.tiny'
