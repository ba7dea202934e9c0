"""`package`: from a checkpoint of train.py to a folder that loads, and an error for everything that can be wrong."""

import argparse
import json
import os
import pickle
import resource
import shutil

import pytest
import timm
import torch
import yaml
from conftest import CLASSES, MODEL
from huggingface_hub import ModelCard
from timm.data import create_dataset, create_loader, resolve_data_config

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.errors import UserError
from timm_regnet_reg.pretrained import file_sha256
from timm_regnet_reg.support.folder import FILES, check_folder


@pytest.fixture
def package(trained, image_folder, tmp_path, capsys):
    """Runs the command; keywords replace arguments. Returns exit code and stderr."""

    def run(checkpoint=trained.checkpoint, *flags, **changed):
        options = {
            'model': MODEL,
            'tag': 'tiny',
            'data_dir': image_folder,
            'data_name': 'noise',
            'recipe': trained.recipe,
            'output': tmp_path / 'out',
            'workers': 0,
            **changed,
        }
        argv = [text for key, value in options.items() for text in (f'--{key.replace("_", "-")}', str(value))]
        code = main(['package', str(checkpoint), *argv, *flags])
        return code, capsys.readouterr().err

    return run


def changed_checkpoint(trained, path, change):
    """A copy of the checkpoint after `change(dict)`."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(trained.checkpoint, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_folder_loads_with_timm_alone_and_gives_the_trained_outputs(trained, packaged):
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f'local-dir:{packaged}', pretrained=True).eval()
    assert {path.name for path in packaged.iterdir()} == {*FILES}
    assert torch.equal(loaded(images), trained.model(images))
    assert loaded.pretrained_cfg['label_names'] == list(CLASSES)
    assert loaded.pretrained_cfg['tag'] == 'tiny' and loaded.pretrained_cfg['license'] == 'apache-2.0'
    expected = timm.create_model(MODEL).pretrained_cfg
    for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'first_conv', 'classifier'):
        recorded = loaded.pretrained_cfg[key]
        assert (tuple(recorded) if isinstance(recorded, list) else recorded) == expected[key]
    assert json.loads((packaged / 'config.json').read_text())['sha256'] == file_sha256(packaged / 'model.safetensors')


def test_all_files_can_be_read_by_others(packaged):
    assert len({path.stat().st_mode for path in packaged.iterdir()}) == 1


def test_card_says_how_well_on_what_and_how_to_reproduce(trained, packaged, image_folder):
    data_config = resolve_data_config(model=trained.model)
    dataset = create_dataset('', root=str(image_folder), split='validation')
    images, labels = next(iter(create_loader(dataset, **data_config, batch_size=12, use_prefetcher=False)))
    top1 = 100 * (trained.model(images).argmax(1) == labels).double().mean().item()

    card = ModelCard.load(packaged / 'README.md')
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics == {'Top-1 accuracy': pytest.approx(top1, abs=1e-3), 'Top-5 accuracy': 100.0}
    assert card.data.license == 'apache-2.0' and card.data.library_name == 'timm'
    for text in (
        '12 images of noise',
        '| Images scored | 12 |',
        '| Recipe | recipe.yaml |',
        '| Epochs | 3 of 3 |',
        '| Seed | 7 |',
        torch.__version__,
        timm.__version__,
        'train.py --config args.yaml',
    ):
        assert text in card.text
    options = yaml.safe_load(card.text.split('```yaml')[1].split('```')[0])
    assert options == {
        'model': MODEL,
        'num_classes': 3,
        'epochs': 3,
        'seed': 7,
        'opt': 'sgd',
        'lr': 0.1,
        'smoothing': 0.0,
        'device_modules': ['timm_regnet_reg'],
    }, 'a zero is an option, and where the training ran is not'


def test_ema_weights_on_request(trained, package, tmp_path):
    assert package(trained.checkpoint, '--use-ema')[0] == 0
    loaded = timm.create_model(f'local-dir:{tmp_path}/out/{MODEL}.tiny', pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), trained.ema(images))
    assert not torch.equal(loaded(images), trained.model(images))


def test_what_the_run_changed_in_its_recipe_stands_in_the_card(trained, package, tmp_path):
    (tmp_path / 'recipe.yaml').write_text('epochs: 164\nopt: sgd\n')
    assert package(recipe=tmp_path / 'recipe.yaml')[0] == 0
    assert 'recipe.yaml with epochs 3 instead of 164 |' in (tmp_path / f'out/{MODEL}.tiny/README.md').read_text()


def test_packaging_again_gives_the_same_bytes_and_leaves_nothing_else(packaged, package, tmp_path):
    for _ in range(2):
        assert package(data_name='12 images of noise')[0] == 0
        assert os.listdir(tmp_path / 'out') == [f'{MODEL}.tiny']
        assert contents(tmp_path / f'out/{MODEL}.tiny') == contents(packaged)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('exploded',)


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda c: c['args'].__setattr__('model', 'resnet18'), ('resnet18', MODEL)),
        (lambda c: c.pop('args'), ("'args'", 'train.py')),
        (lambda c: c['state_dict'].pop('fc.weight'), ('1 of them missing', 'fc.weight')),
        (lambda c: c['state_dict'].update(extra=torch.zeros(1)), ('1 of them unexpected', 'extra')),
        (lambda c: c['state_dict'].update({'fc.bias': torch.zeros(4)}), ('fc.bias (4,) instead of (3,)',)),
        (lambda c: c['state_dict']['fc.bias'].fill_(float('nan')), ('not finite', 'fc.bias', 'diverged')),
        (
            lambda c: c['state_dict']['layer1.0.conv1.weight'][0, 0, 0].fill_(float('inf')),
            ('not finite', 'layer1.0.conv1'),
        ),
        (lambda c: c.update(metric=Bomb()), ('could run code',)),
    ],
    ids=['another_model', 'no_args', 'missing', 'extra', 'shape', 'nan', 'inf', 'code'],
)
def test_unfit_checkpoint_is_refused(trained, package, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    path = changed_checkpoint(trained, tmp_path / 'changed.pth.tar', change)
    code, err = package(path)
    assert code == 1 and all(word in err for word in (str(path), *words)), err
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'exploded').exists()


def test_checkpoint_without_ema_weights_is_refused_only_if_they_are_asked_for(trained, package, tmp_path):
    path = changed_checkpoint(trained, tmp_path / 'plain.pth.tar', lambda c: c.pop('state_dict_ema'))
    code, err = package(path, '--use-ema')
    assert code == 1 and 'no EMA weights' in err and '--model-ema' in err
    assert package(path)[0] == 0


@pytest.mark.parametrize('keep', [0, 100, 0.5, -1])
def test_truncated_checkpoint_is_refused(trained, package, tmp_path, keep):
    data = open(trained.checkpoint, 'rb').read()
    path = tmp_path / 'truncated.pth.tar'
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    code, err = package(path)
    assert code == 1 and str(path) in err and 'truncated' in err and 'another checkpoint' in err


def test_files_that_are_no_checkpoint_are_refused(package, tmp_path):
    assert 'no such file' in package(tmp_path / 'absent.pth.tar')[1]
    (tmp_path / 'text.pth.tar').write_text('hello')
    assert 'cannot be read as a checkpoint' in package(tmp_path / 'text.pth.tar')[1]
    (tmp_path / 'plain.pth.tar').write_bytes(pickle.dumps({'state_dict': {}}, protocol=2))
    assert 'cannot be read as a checkpoint' in package(tmp_path / 'plain.pth.tar')[1]
    torch.save({'weight': torch.zeros(1)}, tmp_path / 'bare.pth.tar')
    assert 'found: weight' in package(tmp_path / 'bare.pth.tar')[1]


def test_arguments_are_checked(package, tmp_path, trained):
    assert 'is not registered in timm' in package(model='resnet_of_mine')[1]
    assert 'expected letters, digits' in package(tag='../up')[1]
    assert 'cannot be read as a recipe' in package(recipe=tmp_path / 'absent.yaml')[1]
    assert not (tmp_path / 'out').exists()


def test_data_must_be_there_and_fit_the_model(package, tmp_path, image_folder):
    assert 'no such folder' in package(data_dir=tmp_path)[1]
    (tmp_path / 'validation' / 'ant').mkdir(parents=True)
    assert 'holds no images' in package(data_dir=tmp_path)[1]
    shutil.copytree(image_folder / 'validation' / 'ant', tmp_path / 'validation' / 'ant', dirs_exist_ok=True)
    code, err = package(data_dir=tmp_path)
    assert code == 1 and 'holds 1 classes' in err and '3' in err
    assert not (tmp_path / 'out').exists()


def test_full_disk_leaves_the_old_folder_as_it_was(package, tmp_path):
    """The kernel itself refuses to let the weights grow beyond 64 KiB, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for existing in (False, True):
        if existing:
            assert package()[0] == 0
        before = contents(tmp_path / f'out/{MODEL}.tiny') if existing else {}
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            code, err = package(data_name='other')
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 1 and 'could not be written' in err and 'another output' in err, err
        assert ('unchanged' if existing else 'Nothing half written was left behind') in err
        assert os.listdir(tmp_path / 'out') == [f'{MODEL}.tiny'] * existing
        assert not existing or contents(tmp_path / f'out/{MODEL}.tiny') == before


@pytest.mark.parametrize('step', ['first fsync', 'last fsync', 'first rename', 'second rename'])
def test_failure_at_any_later_step_leaves_the_old_folder_as_it_was(package, tmp_path, monkeypatch, step):
    assert package()[0] == 0
    before = contents(tmp_path / f'out/{MODEL}.tiny')
    calls = []

    def no_space(original, fails):
        def call(*args):
            calls.append(args)
            if len(calls) == fails:
                raise OSError(28, 'No space left on device')
            return original(*args)

        return call

    which, name = step.split()
    monkeypatch.setattr(os, name, no_space(getattr(os, name), {'first': 1, 'second': 2, 'last': len(FILES) + 1}[which]))
    code, err = package(data_name='other')
    assert code == 1 and 'No space left on device' in err and 'unchanged' in err, err
    assert os.listdir(tmp_path / 'out') == [f'{MODEL}.tiny']
    assert contents(tmp_path / f'out/{MODEL}.tiny') == before


def test_output_that_cannot_be_written_is_told(package, tmp_path):
    (tmp_path / 'file').write_text('not a folder')
    code, err = package(output=tmp_path / 'file')
    assert code == 1 and 'cannot be written' in err and str(tmp_path / 'file') in err
    assert (tmp_path / 'file').read_text() == 'not a folder'


def test_folder_with_files_of_ones_own_is_not_replaced(package, tmp_path):
    folder = tmp_path / f'out/{MODEL}.tiny'
    folder.mkdir(parents=True)
    (folder / 'thesis.tex').write_text('my only copy')
    code, err = package()
    assert code == 1 and 'thesis.tex' in err
    assert os.listdir(folder) == ['thesis.tex']


# Checking a folder, which `publish` does before it sends anything


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))


def resave(folder, change):
    """Changes the weights and makes the hash right again."""
    import safetensors.torch

    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    change(weights)
    safetensors.torch.save_file(weights, folder / 'model.safetensors')
    edit_config(folder, sha256=file_sha256(folder / 'model.safetensors'))


def truncate(path, rehash=False):
    path.write_bytes(path.read_bytes()[:-1000])
    if rehash:
        edit_config(path.parent, sha256=file_sha256(path))


SPOILED = {
    'truncated': (lambda f: truncate(f / 'model.safetensors'), 'SHA-256'),
    'truncated_and_rehashed': (lambda f: truncate(f / 'model.safetensors', True), 'not a safetensors file'),
    'bit_flipped': (lambda f: flip(f / 'model.safetensors', -5), 'SHA-256'),
    'header_flipped': (lambda f: flip(f / 'model.safetensors', 20), 'SHA-256'),
    'wrong_hash': (lambda f: edit_config(f, sha256='0' * 64), 'SHA-256'),
    'unknown_architecture': (lambda f: edit_config(f, architecture='resnet_of_mine'), 'not registered in timm'),
    'wrong_architecture': (lambda f: edit_config(f, architecture='cifar_resnet20'), 'unexpected'),
    'wrong_shape': (lambda f: resave(f, lambda w: w.update({'fc.bias': torch.zeros(2)})), 'fc.bias'),
    'missing_key': (lambda f: resave(f, lambda w: w.pop('fc.bias')), 'missing'),
    'nan': (lambda f: resave(f, lambda w: w['fc.bias'].fill_(float('nan'))), 'not finite'),
    'pickle': (lambda f: (f / 'pytorch_model.bin').write_bytes(pickle.dumps(Bomb())), 'pickles (pytorch_model.bin)'),
    'pickle_in_place': (
        lambda f: (
            (f / 'model.safetensors').write_bytes(pickle.dumps(Bomb())),
            edit_config(f, sha256=file_sha256(f / 'model.safetensors')),
        ),
        'not a safetensors file',
    ),
    'foreign_file': (lambda f: (f / 'notes.txt').write_text(''), 'notes.txt is not expected'),
    'missing_file': (lambda f: (f / 'README.md').unlink(), 'README.md is missing'),
    'broken_config': (lambda f: (f / 'config.json').write_text('{'), 'config.json'),
    'bad_arguments': (lambda f: edit_config(f, model_args={'layers_of_cake': 3}), 'cannot be built'),
    'labels': (lambda f: edit_config(f, label_names=['ant']), 'names 1 labels for 3 classes'),
    'card_without_license': (
        lambda f: (f / 'README.md').write_text((f / 'README.md').read_text().replace('license:', 'lic:')),
        'license',
    ),
    'card_without_score': (lambda f: (f / 'README.md').write_text('---\nlicense: mit\n---\n'), 'Top-1'),
    'card_without_metadata': (lambda f: (f / 'README.md').write_text('# Hello\n'), 'license'),
    'card_unreadable': (lambda f: (f / 'README.md').write_text('---\na: [\n---\n'), 'README.md'),
}


@pytest.mark.parametrize('how', SPOILED)
def test_spoiled_folder_is_refused(packaged, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    spoil, words = SPOILED[how]
    folder = shutil.copytree(packaged, tmp_path / 'folder')
    spoil(folder)
    with pytest.raises(UserError) as error:
        check_folder(folder)
    assert words in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / 'exploded').exists()


def test_sound_folder_passes_and_gives_its_model(trained, packaged):
    folder = check_folder(packaged)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(folder.model(images), trained.model(images))
    assert folder.config['label_names'] == list(CLASSES)
    with pytest.raises(UserError, match='no such folder'):
        check_folder(packaged / 'absent')
