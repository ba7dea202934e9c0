"""`similarity` against the papers' formulas written plainly in float64, and what it prints, writes and refuses."""

import importlib.util
import itertools
import random
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import MODEL
from matplotlib.axes import Axes
from PIL import Image

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.commands import similarity as command
from timm_regnet_reg.commands.similarity import CKA, COSINE, similarity
from timm_regnet_reg.errors import UserError

PLAIN = 'cifar_resnet20'


def hsic(K, L):
    """Song et al. (2012), equation 5, term by term."""
    n = len(K)
    K, L, one = K - torch.diag(K.diag()), L - torch.diag(L.diag()), torch.ones(n, dtype=torch.float64)
    middle = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (torch.trace(K @ L) + middle - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


def cka(Xs, Ys):
    """Nguyen et al. (2021): of batches of features (n, features)."""
    Ks, Ls = ([X.double() @ X.double().T for X in batches] for batches in (Xs, Ys))
    xy, xx, yy = (sum(map(hsic, *grams)) for grams in ((Ks, Ls), (Ks, Ks), (Ls, Ls)))
    return (xy / (xx * yy).sqrt()).item()


def cosine(x, y):
    return sum((a @ b / a.norm() / b.norm()).item() for a, b in zip(x.double(), y.double())) / len(x)


@pytest.fixture
def run(image_folder, packaged, tmp_path, capsys):
    """Runs the command, on a packaged network unless told otherwise. Returns exit code, stdout and stderr."""

    def run(*args, models=(f'local-dir:{packaged}',)):
        options = ['--data-dir', image_folder, '--output', tmp_path / 'new' / 'folder', *args]
        return main(['similarity', *models, *map(str, options)]), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    'name, size', [(PLAIN, 16), (MODEL, 16), ('seresnet50', 32), ('regnet_reg_resnet18_convrnn', 32)]
)
def test_values_are_those_of_the_papers_formulas(name, size):
    torch.manual_seed(0)
    # a zero-initialised branch would leave all blocks of a stage alike
    model = timm.create_model(name, zero_init_last=False).eval()
    batches = [torch.randn(n, 3, size, size) for n in (6, 5, 5)]
    result = similarity(model, batches)

    flat = {block: [] for block in result.blocks}
    for block in flat:
        model.get_submodule(block).register_forward_hook(
            lambda _, __, y, block=block: flat[block].append((y[0] if isinstance(y, tuple) else y).flatten(1))
        )
    with torch.no_grad():
        for images in batches:
            model(images)
    for (i, a), (j, b) in itertools.product(enumerate(flat), repeat=2):
        assert result.values[CKA][i, j].item() == pytest.approx(cka(flat[a], flat[b]), abs=1e-4)
        if a[:6] == b[:6]:
            expected = cosine(torch.cat(flat[a]), torch.cat(flat[b]))
            assert result.values[COSINE][i, j].item() == pytest.approx(expected, abs=1e-5)
        else:
            assert result.values[COSINE][i, j].isnan()
    stages = [stage for stage, _ in itertools.groupby(result.blocks, lambda block: block[:6])]
    assert stages == [f'layer{i}' for i in range(1, 4 if 'resnet20' in name else 5)]


def test_means_over_neighbours_are_printed_and_all_values_drawn(run, packaged, image_folder, tmp_path, monkeypatch):
    models, results, titles = [PLAIN, f'local-dir:{packaged}', f'local-dir:{packaged}/'], [], []
    models.append(f'local-dir:{shutil.copytree(packaged, tmp_path / "other")}')
    monkeypatch.setattr(Axes, 'set_title', lambda axes, text, **_: titles.append(text.split('\n')[0]))
    monkeypatch.setattr(command, 'similarity', lambda *args: results.append(similarity(*args)) or results[-1])
    code, out, _ = run('--images', 9, models=models)
    assert code == 0
    expected = [f'9 images of {image_folder / "validation"}']
    for measure in (CKA, COSINE):
        expected += [f'| {measure} of neighbours | all stages | layer1 | layer2 | layer3 |', f'|---|{4 * "---:|"}']
        for model, (blocks, values) in zip(models, results, strict=True):
            assert blocks == [f'layer{stage}.{i}' for stage in (1, 2, 3) for i in range(3)]
            stages = [[values[measure][i, i + 1].item() for i in (first, first + 1)] for first in (0, 3, 6)]
            means = [sum(stages, []), *stages]
            expected.append(f'| {model} | {" | ".join(f"{sum(mean) / len(mean):.3f}" for mean in means)} |')
        expected.append('')
    assert out.splitlines() == expected[:-1] and titles == 2 * [*models[:3], 'other']
    with Image.open(tmp_path / 'new' / 'folder' / 'similarity.png') as image:
        assert min(image.size) > 500 and len(image.convert('RGB').getcolors(2**24)) > 100


def test_all_models_see_the_same_images_each_as_its_config_says(run, image_folder, monkeypatch):
    def load(name, device):
        model = timm.create_model(MODEL, num_classes=3).eval()
        config = {'input_size': (3, int(name), int(name)), 'mean': (0, 0, 0), 'std': (1, 1, 1)}
        model.pretrained_cfg = dict(model.pretrained_cfg, interpolation='nearest', crop_pct=1.0, **config)
        return model

    seen = []
    monkeypatch.setattr(command, 'load_model', load)
    monkeypatch.setattr(command, 'BATCH_SIZE', 5)
    monkeypatch.setattr(command, 'similarity', lambda m, xs: seen.append([*xs]) or similarity(m, seen[-1]))
    assert run(models=('32', '48'))[0] == 0
    assert [[len(images) for images in batches] for batches in seen] == [[4, 4, 4]] * 2
    small, large = map(torch.cat, seen)
    assert large.shape == (12, 3, 48, 48)
    files = sorted((image_folder / 'validation').rglob('*.png'))
    pixels = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files]
    chosen = random.Random(0).sample(range(12), 12)
    for i, image, enlarged in zip(chosen[::3] + chosen[1::3] + chosen[2::3], small, large, strict=True):
        assert torch.equal(image, pixels[i])
        assert set(enlarged.flatten().tolist()) <= set(pixels[i].flatten().tolist())


@pytest.mark.parametrize(
    'args, message',
    [
        (['--images', 3], '3 of the 12 images of '),
        (['--split', 'test'], 'no such file or folder'),
        (['--output', __file__], 'cannot be written'),
        ([], 'pip install "timm-regnet-reg[plots]"'),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(run, args, message, monkeypatch):
    monkeypatch.setattr(command, 'load_model', lambda name, device: pytest.fail('loaded a model'))
    if not args:
        monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    code, out, err = run(*args)
    assert (code, out) == (1, '') and message in err


def test_a_stage_of_one_block_has_no_neighbours_and_other_networks_are_refused(run, monkeypatch):
    def load(name, device):
        model = timm.create_model(name, num_classes=3, in_chans=1).eval()
        model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,))
        return model

    monkeypatch.setattr(command, 'load_model', load)
    code, out, _ = run(models=['resnet10t'])
    assert code == 0 and out.splitlines()[-1] == '| resnet10t |  |  |  |  |  |'
    code, _, err = run(models=['mobilenetv3_small_050'])
    assert code == 1
    assert 'mobilenetv3_small_050: is a MobileNetV3; expected a timm.models.ResNet, plain or regulated' in err


@pytest.mark.parametrize('value', [float('nan'), 0.1])
@pytest.mark.parametrize('name', [PLAIN, MODEL])
def test_a_block_whose_output_says_nothing_is_named(name, value):
    model = timm.create_model(name).eval()
    model.layer2[1].act2.register_forward_hook(lambda act, inputs, output: torch.full_like(output, value))
    with pytest.raises(UserError, match='layer2.1 gives infinities, NaN or the same for all of 4 images'):
        similarity(model, [torch.randn(4, 3, 16, 16)])
    assert not model.layer1[0]._forward_hooks
