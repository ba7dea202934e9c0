"""`package`: from a checkpoint of train.py to a folder that loads, and an error for everything that can be wrong."""

import argparse
import copy
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import CLASSES, MODEL, full_disk, package_command
from huggingface_hub import ModelCard
from test_files import raising
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import save_for_hf

import timm_regnet_reg
from timm_regnet_reg import pretrained
from timm_regnet_reg.__main__ import main
from timm_regnet_reg.errors import UserError
from timm_regnet_reg.weights.folder import FILES, check_folder, file_sha256
from timm_regnet_reg.weights.scoring import ImageFolder, score


@pytest.fixture
def package(trained, image_folder, tmp_path, capsys):
    """Runs the command, if need be after `change(checkpoint)`; keywords replace arguments. Gives exit code, stderr."""

    def run(*flags, change=None, checkpoint=trained.checkpoint, **changed):
        if change:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(checkpoint, weights_only=True)
            change(content)
            checkpoint = tmp_path / 'run.pth.tar'
            torch.save(content, checkpoint)
        command = package_command(trained, image_folder, **{'output': tmp_path / 'out', **changed})
        try:
            code = main([*command, str(checkpoint), *flags])
        except SystemExit as stop:  # argparse's answer to an argument that it can't take
            code = stop.code
        return code, capsys.readouterr().err

    return run


def set_args(network=None, **changed):
    """Makes a checkpoint that of a run with other arguments, and of another network if one is given."""

    def change(checkpoint):
        vars(checkpoint['args']).update(changed)
        if network is not None:
            checkpoint['state_dict'] = network.state_dict()

    return change


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_outputs(folder, network, channels=3):
    images = torch.randn(2, channels, 48, 48)  # larger than the stride of ImageNet's networks
    assert torch.equal(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images), network(images))


def test_folder_loads_with_timm_alone_and_gives_the_trained_outputs(trained, packaged):
    assert_same_outputs(packaged, trained.model)
    loaded = timm.create_model(f'local-dir:{packaged}', pretrained=True)
    assert {path.name for path in packaged.iterdir()} == {*FILES}
    assert loaded.pretrained_cfg['label_names'] == list(CLASSES)
    assert loaded.pretrained_cfg['tag'] == 'tiny' and loaded.pretrained_cfg['license'] == 'apache-2.0'
    expected = timm.create_model(MODEL).pretrained_cfg
    for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'first_conv', 'classifier'):
        recorded = loaded.pretrained_cfg[key]
        assert (tuple(recorded) if isinstance(recorded, list) else recorded) == expected[key]
    assert json.loads((packaged / 'config.json').read_text())['sha256'] == file_sha256(packaged / 'model.safetensors')
    assert len({path.stat().st_mode for path in packaged.iterdir()}) == 1, 'others can read the weights, too'


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
        '| Images scored | 12, in float32 |',
        '| Recipe | recipe.yaml |',
        '| Epochs | 3 of 3 |',
        '| Seed | 7 |',
        '| Weights | as trained, not averaged |',
        torch.__version__,
        timm.__version__,
        '`python train.py --config args.yaml',
    ):
        assert text in card.text
    options = yaml.safe_load(card.text.split('```yaml')[1].split('```')[0])
    assert options == {
        'epochs': 3,
        'opt': 'sgd',
        'smoothing': 0.0,
        'model': MODEL,
        'num_classes': 3,
        'seed': 7,
        'lr': 0.1,
    }, 'the keys of the recipe and what names the run, and nothing else of the machine that it ran on'


def test_ema_weights_on_request(trained, package, tmp_path):
    code, err = package('--use-ema', batch_size=5)
    assert code == 0 and '3/3' in err  # the progress bar's batches
    assert_same_outputs(tmp_path / f'out/{MODEL}.tiny', trained.ema)
    assert '| Weights | exponential moving' in (tmp_path / f'out/{MODEL}.tiny/README.md').read_text()
    code, err = package('--use-ema', change=lambda c: c.pop('state_dict_ema'))
    assert code == 1 and 'no EMA weights' in err and '--model-ema' in err


def test_card_tells_what_the_run_changed_in_its_recipe_and_that_it_was_resumed(package, tmp_path):
    (tmp_path / 'recipe.yaml').write_text('epochs: 164\nopt: sgd\n')
    run = set_args(resume='old.pth.tar', amp=True, amp_dtype='bfloat16', cooldown_epochs=2, world_size=2)
    assert package(change=run, recipe=tmp_path / 'recipe.yaml', data_name='noise | or not')[0] == 0
    card = (tmp_path / f'out/{MODEL}.tiny/README.md').read_text()
    assert 'recipe.yaml with epochs 3 instead of 164 |' in card
    assert '| Seed | 7 after the last resumption |' in card and '| Epochs | 3 of 5 |' in card
    assert 'amp_dtype: bfloat16' in card and 'regnet-reg reproduce' not in card
    assert '`torchrun --nproc_per_node=2 train.py ' in card and r'| Data | noise \| or not |' in card


def test_packaging_again_gives_the_same_bytes_and_leaves_nothing_else(packaged, package, tmp_path, monkeypatch):
    for _ in range(2):
        assert package()[0] == 0
        assert os.listdir(tmp_path / 'out') == [f'{MODEL}.tiny']
        assert contents(tmp_path / f'out/{MODEL}.tiny') == contents(packaged)
    monkeypatch.setattr(pretrained, 'WEIGHTS_FOLDER', tmp_path / 'out')
    assert package()[0] == 0, 'it can write straight into the folder of packaged weights'
    monkeypatch.setattr(os, 'chmod', raising(errno.EPERM))
    assert package()[0] == 0, 'also on a file system that cannot change modes'


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('exploded',)


@pytest.mark.parametrize(
    'change, words',
    [
        (set_args(model='resnet18'), ('is a checkpoint of resnet18', MODEL)),
        (lambda c: c.pop('args'), ("'args'", 'train.py')),
        (set_args(model_kwargs={'layers_of_cake': 3}), ('does not fit', 'layers_of_cake')),
        (set_args(input_size=[3, 32]), ('does not fit', 'input_size')),
        (set_args(class_map='map.txt'), ('--class-map map.txt', 'save_for_hf')),
        (set_args(interpolation='nope'), ('cannot classify', 'nope')),
        (lambda c: c['state_dict']['bn1.running_var'].fill_(-1), ('not finite',)),
        (lambda c: c['state_dict'].pop('fc.weight'), ('1 weights are missing', 'fc.weight')),
        (lambda c: c['state_dict'].update({'fc.bias': torch.zeros(4)}), ('size mismatch for fc.bias',)),
        (lambda c: c.update(metric=Bomb()), ('could run code',)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else '',
)
def test_unfit_checkpoint_is_refused(package, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    code, err = package(change=change)
    assert code == 1 and all(word in err for word in (f'{tmp_path}/run.pth.tar', *words)), err
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'exploded').exists()


def test_file_that_is_no_checkpoint_is_refused(trained, package, tmp_path):
    path = tmp_path / 'bad.pth.tar'
    for _ in ('missing', 'truncated'):
        code, err = package(checkpoint=path)
        assert code == 1 and f'{path}: cannot be read as a checkpoint' in err and 'another checkpoint' in err
        path.write_bytes(Path(trained.checkpoint).read_bytes()[:9000])


@pytest.fixture
def no_scoring(monkeypatch):
    """Scoring takes long: whatever can be known before it must be."""
    monkeypatch.setattr('timm_regnet_reg.commands.package.score', lambda *args: pytest.fail('scored first'))


@pytest.mark.parametrize(
    'changed, words',
    [
        ({'model': 'resnet_of_mine'}, 'does not fit --model resnet_of_mine'),
        ({'tag': '../up'}, 'expected letters, digits'),
        ({'recipe': 'absent.yaml'}, 'cannot be read as a recipe'),
        ({'license': ' '}, '--license'),
        ({'data_name': '\udcff'}, '--data-name'),
        ({'workers': -1}, 'from 0 to'),
        ({'device': 'cuda:99'}, '--device cuda:99: expected cpu'),
        ({'split': 'validation/..'}, "--split 'validation/..'"),
        ({'output': '/proc/here'}, 'cannot be written'),
    ],
)
def test_arguments_are_checked_before_the_work(package, no_scoring, tmp_path, monkeypatch, changed, words):
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    code, err = package(**{'output': '.', **changed})
    assert code in (1, 2) and words in err.splitlines()[-1] and not os.listdir()


@pytest.mark.parametrize('split', ['train', 'training'])
def test_data_must_be_of_the_classes_that_were_trained(package, no_scoring, tmp_path, image_folder, split):
    images = shutil.copytree(image_folder, tmp_path / 'images')
    shutil.copytree(images / 'validation', images / split)
    (images / 'validation/bee').rename(images / 'validation/eel')
    code, err = package(data_dir=images, change=None if split == 'train' else set_args(train_split=split))
    assert code == 1 and 'missing: bee; added: eel' in err and str(images) in err
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('workers', [0, 1])
def test_image_that_cannot_be_read_is_named(package, tmp_path, image_folder, workers):
    images = shutil.copytree(image_folder, tmp_path / 'images')
    bad = images / 'validation/bee/2.png'
    os.truncate(bad, 1000)
    code, err = package(data_dir=images, workers=workers)
    assert code == 1 and err.splitlines()[-1].startswith(f'regnet-reg: error: {bad}: cannot be read as an image (')
    assert not (tmp_path / 'out').exists()


def test_outputs_that_are_not_finite_make_no_score(trained, image_folder):
    model = copy.deepcopy(trained.model)
    torch.nn.init.constant_(model.fc.bias, torch.nan)
    config = resolve_data_config(model=model)
    with pytest.raises(UserError, match='scoring: the outputs are not finite'):
        score(model, ImageFolder(image_folder / 'validation', config, num_classes=3), config, workers=0)


def test_one_channel_run_loads_and_classifies(package, tmp_path, image_folder):
    model = timm.create_model(MODEL, num_classes=3, in_chans=1).eval()
    assert package(change=set_args(model, input_size=[1, 32, 32]))[0] == 0
    folder = tmp_path / f'out/{MODEL}.tiny'
    assert_same_outputs(folder, model, channels=1)
    assert main(['classify', '--model', f'local-dir:{folder}', str(image_folder / 'validation/bee/2.png')]) == 0


def test_options_of_train_py_that_make_the_network_are_kept(package, tmp_path):
    name, options = 'test_efficientnet', dict(in_chans=1, bn_eps=0.1)
    network = timm.create_model(name, num_classes=3, global_pool='max', **options).eval()
    assert package(change=set_args(network, model=name, gp='max', **options), model=name)[0] == 0
    assert_same_outputs(tmp_path / f'out/{name}.tiny', network, channels=1)


def test_auxiliary_norms_are_left_out(trained, package, tmp_path):
    """As `train.py --split-bn` writes them; evaluation takes the main norms alone."""
    split = timm.layers.convert_splitbn_model(copy.deepcopy(trained.model), 2).eval()
    assert package(change=lambda checkpoint: checkpoint.update(state_dict=split.state_dict()))[0] == 0
    assert_same_outputs(tmp_path / f'out/{MODEL}.tiny', split)


# Where a run started


def assert_packaged(tmp_path, network, model=MODEL, source='', **arguments):
    assert_same_outputs(tmp_path / f'out/{model}.tiny', network)
    folder = check_folder(tmp_path / f'out/{model}.tiny')
    assert folder.config['model_args'].items() >= arguments.items()
    options = yaml.safe_load(folder.card.text.split('```yaml')[1].split('```')[0])
    assert options['model'] == (source if source.startswith(f'{model}.') else model)
    assert options.get('model_kwargs', {}).items() >= arguments.items()
    assert ('started from the network of a folder' in folder.card.text) == (':' in source)
    assert 'my-network' not in f'{folder.card} {folder.config}', "a place of ones own is nobody else's business"


@pytest.mark.parametrize(
    'model, arguments',
    [
        (MODEL, {'regulated_stages': [1], 'shortcut': 'pad'}),
        ('regnet_reg', {'backbone': 'cifar_resnet20', 'cell': 'convgru', 'regulated_stages': [2]}),
    ],
)
def test_arguments_of_the_network_are_kept(package, tmp_path, model, arguments):
    """As `train.py --model … --model-kwargs …` gives them."""
    network = timm.create_model(model, num_classes=3, **arguments).eval()
    given = {**arguments, 'cache_dir': '/home/me/my-network'}
    change = set_args(network, model=model, model_kwargs=given, input_size=[3, 32, 32])
    assert package(change=change, model=model)[0] == 0
    assert_packaged(tmp_path, network, model, **arguments)


@pytest.mark.parametrize(
    'source', ['local-dir:{here}/my-network', 'local-dir:my-network/', 'hf_hub:owner/my-network@{commit}']
)
@pytest.mark.parametrize('model', ['regnet_reg', MODEL])
def test_run_that_started_from_a_folder_or_repository(package, tmp_path, hub, monkeypatch, source, model):
    """README's `my-network` and OWNER/NAME, which aren't called like the architecture, with arguments of their own."""
    monkeypatch.chdir(tmp_path)
    if model == MODEL:
        network = timm.create_model(MODEL, regulated_stages=[1])
    else:
        network = timm_regnet_reg.regulate(timm.create_model('cifar_resnet20'), cell='convgru', stages=[1])
    told = {'pretrained_cfg': {'description': 'of my-network, and not of what comes of it'}}
    save_for_hf(network, 'my-network', model_config=told, safe_serialization=True)
    commit = hub.add_repo('owner/my-network', contents(tmp_path / 'my-network'))
    hub.repos['owner/my-network'].commit('main', {})
    source = source.format(here=tmp_path, commit=commit)
    tuned = timm.create_model(source, num_classes=3).eval()
    assert package(change=set_args(tuned, model=source), model=model)[0] == 0
    assert_packaged(tmp_path, tuned, model, source, regulated_stages=[1])
    code, err = package(change=set_args(tuned, model=source), model='cifar_resnet20')
    assert code == 1 and f'is a checkpoint of {model}; give one of cifar_resnet20' in err


def test_options_of_the_run_count_for_more_than_its_sources(package, tmp_path):
    save_for_hf(timm.create_model(MODEL, regulated_stages=[1], shortcut='pad'), tmp_path / 'my-network')
    source = f'local-dir:{tmp_path}/my-network'
    tuned = timm.create_model(source, num_classes=3, regulated_stages=[2, 3]).eval()
    assert package(change=set_args(tuned, model=source, model_kwargs={'regulated_stages': [2, 3]}))[0] == 0
    assert_packaged(tmp_path, tuned, source=source, regulated_stages=[2, 3], shortcut='pad')


def test_run_that_started_from_packaged_weights(package, tmp_path):
    tuned = timm.create_model(f'{MODEL}.cifar10', num_classes=3).eval()
    assert package(change=set_args(tuned, model=f'{MODEL}.cifar10', pretrained=True))[0] == 0
    assert_packaged(tmp_path, tuned, source=f'{MODEL}.cifar10')


def test_license_is_that_of_the_weights_that_training_started_from(package, tmp_path, hub):
    model, start = 'regnet_reg_resnet18_convgru', 'regnet_reg_resnet18_convgru.warm_fb_swsl_ig1b_ft_in1k'
    change = set_args(timm.create_model(model, num_classes=3), model=start, input_size=[3, 32, 32], pretrained=True)
    for flags, license in (([], 'cc-by-nc-4.0'), (['--license', 'mit'], 'mit')):
        assert package(*flags, change=change, model=model)[0] == 0
        folder = check_folder(tmp_path / f'out/{model}.tiny')
        assert folder.card.data.license == folder.config['pretrained_cfg']['license'] == license
        assert f'| License of the weights | {license} |' in folder.card.text
    gone = set_args(model='hf-hub:owner/gone', model_kwargs={'pretrained': True})
    code, err = package(change=gone)
    assert code == 1 and 'the license of hf-hub:owner/gone, where the training started, is not known' in err
    assert package('--license', 'mit', change=gone)[0] == 0
    for start in ({'initial_checkpoint': 'mine.pth'}, {'pretrained_path': 'mine.pth', 'pretrained': True}):
        code, err = package(change=set_args(**start))
        assert code == 1 and 'the license of mine.pth, where the training started, is not known; give one' in err


@pytest.mark.parametrize('source', ['local-dir:/no/such/my-network', 'hf-hub:owner/my-network', f'{MODEL}.no_more'])
@pytest.mark.parametrize('stages', [[1], [1, 2, 3]])
def test_where_the_source_is_gone_the_weights_decide(package, tmp_path, hub, source, stages):
    tuned = timm.create_model(MODEL, num_classes=3, regulated_stages=stages).eval()
    assert package(change=set_args(tuned, model=source))[0] == 0
    assert_packaged(tmp_path, tuned, source=source, regulated_stages=stages)
    for other, told in (('regnet_reg_resnet20_convgru', 'size mismatch'), ('cifar_resnet20', 'weights are unexpected')):
        code, err = package(change=set_args(tuned, model=source), model=other)
        assert code == 1 and f'does not fit --model {other}' in err and told in err


def test_card_edited_by_hand_is_replaced_only_if_asked_for(package, tmp_path):
    card = tmp_path / f'out/{MODEL}.tiny/README.md'
    assert package()[0] == 0
    written = card.read_text()
    card.write_text(written + 'My own words.')
    code, err = package()
    assert code == 1 and str(card) in err and '--overwrite' in err
    assert 'My own words.' in card.read_text()
    assert package('--overwrite')[0] == 0 and card.read_text() == written


def test_full_disk_leaves_the_old_folder_as_it_was(package, packaged, tmp_path):
    for existing in ([], [f'{MODEL}.tiny']):
        with full_disk(64):
            code, err = package(data_name='other')
        assert code == 1 and 'could not be written' in err and 'another output' in err, err
        assert os.listdir(tmp_path / 'out') == existing
        shutil.copytree(packaged, tmp_path / f'out/{MODEL}.tiny', dirs_exist_ok=True)
    assert contents(tmp_path / f'out/{MODEL}.tiny') == contents(packaged)


# Checking a folder, which `publish` does before it sends anything


def edit_config(folder, **changes):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))


def rehash(folder, data):
    """Other weights with the right hash."""
    (folder / 'model.safetensors').write_bytes(data)
    edit_config(folder, sha256=file_sha256(folder / 'model.safetensors'))


@pytest.mark.parametrize(
    'spoil, words',
    [  # what `load_model` refuses besides, test_classify.py shows, and files that are added, test_publish.py
        (lambda f: os.truncate(f / 'model.safetensors', 1000), 'SHA-256'),
        (lambda f: edit_config(f, architecture='cifar_resnet20'), 'unexpected'),
        (lambda f: edit_config(f, model_args={'layers_of_cake': 3}), 'layers_of_cake'),
        (lambda f: (f / 'config.json').write_text('{'), 'not a config that `package` wrote'),
        (lambda f: rehash(f, pickle.dumps(Bomb())), 'could not be loaded'),
        (shutil.rmtree, 'no such folder'),
        (lambda f: (f / 'README.md').unlink(), 'missing: README.md'),
        (lambda f: (f / 'README.md').write_text('---\nlicense: mit\n---\n'), 'no accuracy'),
        (
            lambda f: (f / 'README.md').write_text((f / 'README.md').read_text().replace('license:', 'licence:')),
            'no license',
        ),
        (lambda f: (f / 'README.md').write_text('---\na: [\n---\n'), 'not the front matter'),
    ],
)
def test_spoiled_folder_is_refused(packaged, tmp_path, monkeypatch, spoil, words):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(packaged, tmp_path / 'folder')
    spoil(folder)
    with pytest.raises(UserError) as error:
        check_folder(folder)
    assert words in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / 'exploded').exists()
