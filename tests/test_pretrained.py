"""`pretrained=True`: warm starts from a faked `timm/...` on a local Hub, folders of trained weights, and bad files.

The reference for a warm start is timm's own network, loaded by timm from the same repository.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from conftest import CLASSES, MODEL
from networks import CELLS, IN_TIMM, TINY, assert_close, images, randomize
from test_models import MODELS, backbone_of
from timm.models import get_pretrained_cfg, save_for_hf

import timm_regnet_reg
from timm_regnet_reg import pretrained
from timm_regnet_reg.cells import ConvGRU
from timm_regnet_reg.weights.folder import check_folder

WARM = 'regnet_reg_resnet18_convlstm'
REPO = 'timm/resnet18.a1_in1k'
FOLDERS = sorted(path.parent for path in pretrained.WEIGHTS_FOLDER.glob('[!.]*/config.json'))


def files_of(model, folder):
    """What timm writes for the model: `config.json` and `model.safetensors`, by name."""
    save_for_hf(model, str(folder), safe_serialization=True)
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope='module')
def resnet18(tmp_path_factory):
    """`(network, its files)`, as timm publishes them: a small resnet18.a1_in1k that has been through something."""
    model = randomize(timm.create_model('resnet18.a1_in1k', **TINY)).eval()
    return model, files_of(model, tmp_path_factory.mktemp('resnet18'))


@pytest.fixture
def timm_hub(hub, resnet18):
    """The local Hub, with resnet18.a1_in1k where timm has it."""
    hub.add_repo(REPO, resnet18[1])
    return hub


# Warm starts


@pytest.mark.parametrize(
    'name, kwargs',
    [(f'regnet_reg_resnet18_{cell}{tag}', {}) for cell in CELLS for tag in ('', '.warm_a1_in1k')]
    + [('regnet_reg', dict(backbone='resnet18', cell='convgru', regulated_stages=stages)) for stages in (None, (1,))],
)
def test_warm_start_is_what_regulate_makes_of_the_backbone(timm_hub, resnet18, name, kwargs):
    """Its fusion's batch norm, too, which evaluation doesn't tell from any other that undoes itself."""
    model = timm.create_model(name, pretrained=True, **TINY, **kwargs).eval()
    regulated = timm_regnet_reg.regulate(resnet18[0], stages=kwargs.get('regulated_stages'))
    state, expected = model.state_dict(), regulated.state_dict()
    assert state.keys() == expected.keys()
    drawn = ('.regulator.', '.fusion_conv_h')  # at random
    assert all(torch.equal(state[key], expected[key]) for key in state if not any(part in key for part in drawn))
    assert_close(model(images(model)), resnet18[0](images(model)))


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(in_chans=4),
        dict(output_stride=8),
        dict(regulated_stages=(1,)),
        dict(regulated_stages=()),
        dict(num_classes=0, dtype=torch.float64),
        dict(features_only=True, num_classes=7),
        dict(features_only=True, out_indices=(1, 3), output_stride=16, in_chans=1),
    ],
    ids=str,
)
def test_warm_start_takes_the_arguments_that_timms_backbone_takes(timm_hub, kwargs):
    model = timm.create_model(WARM, pretrained=True, **TINY, **kwargs).eval()
    kwargs = {key: value for key, value in kwargs.items() if key != 'regulated_stages'}
    plain = timm.create_model('resnet18.a1_in1k', pretrained=True, **TINY, **kwargs).eval()
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 64, dtype=kwargs.get('dtype'))
    assert_close(model(x), plain(x), tolerance=1e-10 if 'dtype' in kwargs else 1e-4)


@pytest.mark.parametrize('backbone', ['local-dir:resnet18', 'hf-hub:timm/resnet18.a1_in1k', torch.nn.ReLU()])
def test_a_backbone_that_is_not_registered_is_refused(backbone):
    told = re.escape(f'backbone={backbone!r} was given: ')
    with pytest.raises(ValueError, match=f'{told}.* give it to timm_regnet_reg.regulate'):
        timm.create_model('regnet_reg', backbone=backbone)


@pytest.mark.filterwarnings('ignore:Mapping deprecated model name tv_resnet34 to current resnet34.tv_in1k')
def test_an_old_name_of_timms_is_the_backbone_of_the_new_one():
    old, new = (timm.create_model('regnet_reg', backbone=name, **TINY) for name in ('tv_resnet34', 'resnet34.tv_in1k'))
    assert old.pretrained_cfg == new.pretrained_cfg


@pytest.mark.parametrize('tag', ['', '.cifar10_stage3'])
def test_weights_that_are_regulated_already_are_no_backbone(tag):
    with pytest.raises(ValueError, match=f'{MODEL}{tag}.* of a regulated network: a plain network is expected'):
        timm.create_model('regnet_reg', backbone=f'{MODEL}{tag}', pretrained=True)
    model = timm.create_model('regnet_reg', backbone=f'{MODEL}{tag}', cell='convgru')  # its plain network
    assert [type(stage.regulator) for stage in model.stages()] == 3 * [ConvGRU]
    assert not model.pretrained_cfg.get('label_names')


@pytest.mark.parametrize('name, kwargs', [(MODEL, {}), ('regnet_reg', dict(backbone='cifar_resnet20', cell='convgru'))])
def test_own_plain_weights_start_a_regulated_network_where_strictness_is_off(name, kwargs):
    plain = randomize(timm.create_model('cifar_resnet20')).eval()
    own = {key: value.clone() for key, value in plain.state_dict().items()}
    weights = {key: value for key, value in own.items() if key != 'layer2.0.conv1.weight'}
    for overlay in (dict(state_dict=own), dict(state_dict={**weights, 'extra': torch.ones(1)})):
        lenient = dict(pretrained=True, pretrained_strict=False, pretrained_cfg_overlay=overlay)
        model = timm.create_model(name, **kwargs, **lenient).eval()
        plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
        assert_close(model(images(model)), plain(images(model)))
        assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_a_tags_network_takes_weights_of_another_place_as_train_py_names_them(tmp_path):
    """`--pretrained-path` comes with num_classes=-1."""
    name = 'regnet_reg_resnet20_convlstm.cifar10_stage3'
    own = randomize(timm.create_model(name))
    torch.save(own.state_dict(), tmp_path / 'own.pth')
    overlay = dict(file=str(tmp_path / 'own.pth'), num_classes=-1)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.num_classes == 10 and model.state_dict().keys() == own.state_dict().keys()
    assert torch.equal(model.layer3.regulator.pointwise, own.layer3.regulator.pointwise)
    for given in (name, 'resnet18'):  # a cfg's input size decides, as in timm
        assert timm.create_model(given, pretrained_cfg_overlay=dict(input_size=(1, 32, 32))).in_chans == 1


@pytest.mark.parametrize('name', ['resnet18', WARM])
def test_overlay_names_other_weights(hub, tmp_path, name):
    """Of a backbone, or of a regulated network, whose regulators are loaded, too."""
    other = randomize(timm.create_model(name, num_classes=5, **TINY), seed=3).eval()
    torch.save(dict(state_dict=other.state_dict(), epoch=3), tmp_path / 'last.pth.tar')
    # as before torch 0.4.1
    uncounted = {key: t for key, t in other.state_dict().items() if not key.endswith('num_batches_tracked')}
    for overlay in (dict(file=str(tmp_path / 'last.pth.tar')), dict(state_dict=uncounted)):
        overlay['num_classes'] = 5
        for strict in (True, False):
            how = dict(pretrained=True, pretrained_cfg_overlay=overlay, pretrained_strict=strict)
            model = timm.create_model(WARM, **how, **TINY).eval()
            assert_close(model(images(model)), other(images(model)), 1e-4)
    assert hub.requests == []


@pytest.mark.parametrize(
    'kwargs, key',
    [
        (dict(), 'layer1.1.conv1.weight'),
        (dict(num_classes=7), 'layer1.1.conv1.weight'),  # where timm adapts the classifier, it lets anything pass
        (dict(features_only=True), 'layer1.1.conv1.weight'),
        (dict(shortcut='none'), 'layer1.0.downsample'),
        (dict(act_layer='silu'), 'regulate() accepts'),
        (dict(norm_layer='groupnorm1'), 'regulate() accepts'),
    ],
)
def test_warm_start_refuses_another_network(hub, resnet18, kwargs, key):
    state_dict = dict(resnet18[0].state_dict())
    state_dict.pop(key, None)
    with pytest.raises(RuntimeError, match=f'weights of {WARM} could not be loaded.*{re.escape(key)}'):
        timm.create_model(WARM, True, pretrained_cfg_overlay=dict(state_dict=state_dict), **TINY, **kwargs)
    lenient = dict(pretrained_strict=False, pretrained_cfg_overlay=dict(state_dict=state_dict))
    timm.create_model(WARM, pretrained=True, **TINY, **lenient, **kwargs)


# Configs and lists


def test_warm_start_has_timms_own_config():
    """Everything but what it is called."""
    names = [name for name in timm.list_pretrained('regnet_reg_*') if '.warm_' in name]
    assert len(names) > 200
    for name in names:
        arch, tag = name.split('.warm_')
        cfg, theirs = get_pretrained_cfg(name), get_pretrained_cfg(f'{backbone_of(arch)}.{tag}')
        assert (cfg.architecture, cfg.tag) == (arch, f'warm_{tag}')
        renamed = dict(architecture=None, tag=None)
        assert dataclasses.replace(cfg, **renamed) == dataclasses.replace(theirs, **renamed)
        assert cfg.hf_hub_id.split('/')[0] == 'timm' and cfg.file is None and cfg.source is None


def test_every_model_has_its_tags_and_the_first_one_by_default():
    """Those of the trained folders, then timm's of its backbone, timm's own default first."""
    expected, without = set(), []
    for name in MODELS:
        tags = [folder.name.split('.')[1] for folder in FOLDERS if folder.name.startswith(f'{name}.')]
        if backbone_of(name) in IN_TIMM:
            default = get_pretrained_cfg(backbone_of(name)).tag
            theirs = [listed.split('.')[1] for listed in timm.list_pretrained(backbone_of(name))]
            tags += [f'warm_{tag}' for tag in sorted(theirs, key=lambda tag: tag != default)]
        cfg = get_pretrained_cfg(name)
        assert (cfg.architecture, cfg.tag, bool(cfg.has_weights)) == (name, (tags or [None])[0], bool(tags))
        expected.update(f'{name}.{tag}' for tag in tags)
        without += [] if tags else [name]
    listed = timm.list_pretrained(['regnet_reg_*', 'cifar_resnet*', 'cifar_seresnet*'])
    assert len(listed) == len(set(listed)) and set(listed) == expected
    for name in without[::20]:  # each takes a while to build
        with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
            timm.create_model(name, pretrained=True)


# Trained weights


@pytest.fixture
def folder(packaged, tmp_path, monkeypatch):
    """A copy of `packaged`, in a folder of weights that stands for the project's."""
    weights = tmp_path / 'weights'
    monkeypatch.setattr(pretrained, 'WEIGHTS_FOLDER', weights)
    return Path(shutil.copytree(packaged, weights / packaged.name))


def load_registered(folder, **kwargs):
    """As create_model(MODEL, pretrained=True) once the registry has read the folder of weights."""
    return timm.create_model(MODEL, True, pretrained.trained_cfgs()[folder.name], **kwargs).eval()


def test_overlay_of_trained_weights_with_another_repository_or_file(trained, folder, hub, tmp_path):
    """They come with a file, which must not hide what the overlay asks for."""
    hub.add_repo('owner/ema', files_of(trained.ema, tmp_path / 'ema'))
    x = images(trained.model)
    assert not torch.equal(trained.ema(x), trained.model(x))
    torch.save(trained.ema.state_dict(), tmp_path / 'ema.pth')
    for overlay in (
        dict(hf_hub_id='owner/ema'),
        dict(file=str(tmp_path / 'ema/model.safetensors')),
        dict(url=(tmp_path / 'ema.pth').as_uri()),
    ):
        model = load_registered(folder, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / 'cache')
        assert torch.equal(model(x), trained.ema(x))
    assert 'models--owner--ema' in os.listdir(tmp_path / 'cache')


def test_label_names_are_of_the_packaged_weights_and_of_no_others(tmp_path):
    """Ten is the form's own number of classes, so that timm saves what names there are."""
    own = timm.create_model('cifar_resnet20')
    weights = {'state_dict': {key: value.clone() for key, value in own.state_dict().items()}}
    for model in (
        own,
        timm.create_model('cifar_resnet20', pretrained=True, pretrained_cfg_overlay=weights),
        timm.create_model('regnet_reg', backbone='cifar_resnet20'),
        timm.create_model('cifar_resnet20', pretrained_cfg=timm.get_pretrained_cfg('cifar_resnet20').to_dict()),
    ):
        assert b'label_names' not in files_of(model, tmp_path / 'saved')['config.json']
    for kwargs in (dict(pretrained=True), dict(pretrained_cfg_overlay={'label_names': list('abcdefghij')})):
        assert len(timm.create_model('cifar_resnet20', **kwargs).pretrained_cfg['label_names']) == 10


INSTALLED = f"""
import json, sys, timm, timm_regnet_reg, safetensors.torch
images = safetensors.torch.load_file(sys.argv[1])['images']
model = timm.create_model({MODEL!r}, pretrained=True).eval()
print(json.dumps([model(images).tolist(), model.pretrained_cfg, timm.list_pretrained({MODEL!r})]))
"""


def test_installed_package_finds_the_weights_inside_itself(trained, packaged, hub, tmp_path):
    """In the layout of the wheel, whose weights are in the package, in a fresh process."""
    code, site = Path(timm_regnet_reg.__file__).parent, tmp_path / 'site'
    shutil.copytree(code, site / code.name, ignore=shutil.ignore_patterns('pretrained_cfgs', '__pycache__'))
    weights = site / code.name / 'pretrained_cfgs'
    shutil.copytree(packaged, weights / packaged.name)
    (weights / '.half.new').mkdir()
    (weights / '.half.new/config.json').write_text('{')  # somebody packages another one meanwhile
    safetensors.torch.save_file({'images': images(trained.model)}, tmp_path / 'images')
    env = {**os.environ, 'PYTHONPATH': str(site), 'HF_ENDPOINT': hub.endpoint, 'HF_HOME': str(tmp_path / 'home')}
    command = [sys.executable, '-c', INSTALLED, tmp_path / 'images']
    run = subprocess.run(command, cwd=site, env=env, stdout=subprocess.PIPE, text=True, check=True)
    outputs, cfg, listed = json.loads(run.stdout.splitlines()[-1])
    assert outputs == trained.model(images(trained.model)).tolist()
    assert cfg['file'] == str(weights / packaged.name / 'model.safetensors')
    assert (cfg['architecture'], cfg['tag'], tuple(cfg['label_names'])) == (MODEL, 'tiny', CLASSES)
    assert listed == [f'{MODEL}.tiny']
    assert hub.requests == []


@pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_of_weights_is_whole_and_loads(folder, hub):
    checked = check_folder(folder)
    name, tag = folder.name.split('.')
    assert checked.config['architecture'] == name
    model = timm.create_model(folder.name, pretrained=True).eval()
    assert torch.equal(model(images(model)), checked.model(images(model)))
    assert model.pretrained_cfg['tag'] == tag
    assert list(model.pretrained_cfg['label_names']) == checked.config['label_names']
    assert not any(isinstance(value, list) for value in model.pretrained_cfg.values()), 'tuples, as in all cfgs of timm'
    assert hub.requests == []


# Bad files


def test_weights_that_are_no_tensors_are_refused_by_name(trained):
    state_dict = {**trained.model.state_dict(), 'layer1.0.bn1.weight': [1.0] * 16}
    with pytest.raises(RuntimeError, match='1 weights are not floating-point tensors: layer1.0.bn1.weight'):
        timm.create_model(MODEL, num_classes=3, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))


@pytest.mark.parametrize('kwargs', [{}, dict(num_classes=9)], ids=['as it is', 'other classes'])
@pytest.mark.parametrize(
    'damage, message',
    [
        (lambda s: s.pop('layer2.0.regulator_bn.weight'), '1 weights are missing: layer2.0.regulator_bn.weight.'),
        (lambda s: s.update(extra=torch.ones(1)), '1 weights are unexpected: extra.'),
        (lambda s: s.update({'layer1.0.bn1.weight': torch.ones(9)}), 'size mismatch for layer1.0.bn1.weight'),
        (lambda s: s['layer3.2.conv2.weight'][0, 0].fill_(torch.nan), 'not finite: layer3.2.conv2.weight.'),
        (lambda s: s.update({'layer1.0.bn1.bias': torch.ones(16).char()}), 'floating-point tensors: layer1.0.bn1.bias'),
        (
            lambda s: [s.pop(key) for key in [*s] if re.search(r'\.(regulator|fusion)', key)],
            "a plain network's; pretrained_strict=False adds regulators",
        ),
    ],
    ids=['missing key', 'extra key', 'shape', 'NaN', 'integers', 'plain'],
)
def test_bad_weights_are_refused_by_name(folder, kwargs, damage, message):
    """timm itself lets keys pass where it adapts the classifier."""
    state_dict = safetensors.torch.load_file(folder / 'model.safetensors')
    damage(state_dict)
    safetensors.torch.save_file(state_dict, folder / 'model.safetensors')
    with pytest.raises(RuntimeError) as error:
        load_registered(folder, **kwargs)
    assert message in str(error.value)
    # torch tells of shapes, when it loads
    assert 'size mismatch' in message or f'weights of {MODEL} could not be loaded' in str(error.value)
