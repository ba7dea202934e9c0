"""Networks with arguments of their own, and those that `regulate` gives, saved by timm and loaded by it again."""

import copy
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from networks import TINY, enliven, images
from timm.models import load_checkpoint, push_to_hf_hub, resolve_model_input_args, resume_checkpoint, save_for_hf

from timm_regnet_reg import pretrained, regnet_reg, regulate


def save(model, folder):
    save_for_hf(model, str(folder), safe_serialization=True)
    return f'local-dir:{folder}'


def load(source, **kwargs):
    return timm.create_model(source, pretrained=True, **kwargs).eval()


def network(name, regulate_kwargs, **kwargs):
    """A network that is nowhere at its start any more, regulated if arguments for that are given."""
    model = timm.create_model(name, **kwargs)
    return enliven(model if regulate_kwargs is None else regulate(model, **regulate_kwargs))


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # huggingface_hub's about its own arguments
@pytest.mark.parametrize(
    'name, regulate_kwargs, kwargs',
    [
        ('ecaresnet50t', {}, TINY),
        ('ecaresnet50t.a1_in1k', dict(cell='convgru', stages=(2,)), TINY),
        ('resnet50d', dict(stages=[3, 1]), dict(TINY, output_stride=16, in_chans=2, num_classes=5)),
        ('resnetrs50', dict(cell='convrnn'), dict(TINY, drop_path_rate=0.2, drop_block_rate=0.1, global_pool='max')),
        ('resnet34', {}, dict(TINY, block_args=dict(attn_layer='eca'), num_classes=0)),
        ('resnetblur18', dict(stages=()), TINY),
        ('cifar_resnet20', {}, dict(shortcut='pad')),
        ('cifar_seresnet20', dict(stages=(1, 3)), dict(output_stride=2)),
        ('regnet_reg_resnet50_convgru', dict(cell='convrnn'), dict(TINY, regulated_stages=(), shortcut='none')),
        ('regnet_reg', dict(stages=(4,)), dict(TINY, backbone='resnet50t', regulated_stages=())),
        # without regulate
        ('regnet_reg', None, dict(TINY, backbone='resnext50_32x4d', cell='convrnn', regulated_stages=(2, 4))),
        ('regnet_reg', None, dict(backbone='cifar_resnet20.cifar10', cell='convgru')),
        ('regnet_reg_resnet50_convlstm', None, dict(TINY, regulated_stages=(1,), act_layer='silu')),
    ],
    ids=str,
)
def test_saved_and_published_network_comes_back(hub, tmp_path, name, regulate_kwargs, kwargs):
    model = network(name, regulate_kwargs, **kwargs)
    saved = save(model, tmp_path / 'saved')
    push_to_hf_hub(model, 'owner/name', safe_serialization=True)
    x = images(model)
    for loaded in (load('hf-hub:owner/name'), load(saved)):
        assert type(loaded) is type(model) and list(loaded.state_dict()) == list(model.state_dict())
        assert torch.equal(loaded(x), model(x)) and loaded(x).abs().max() > 1e-3
    assert torch.equal(load(saved, num_classes=7).forward_features(x), model.forward_features(x))
    intermediates = model.forward_intermediates(x, intermediates_only=True)
    assert all(map(torch.equal, load(saved, features_only=True)(x), intermediates))
    for in_chans in {1, 3} - {model.in_chans}:
        other = load(saved, in_chans=in_chans, num_classes=7)
        assert other(images(other)).shape == (2, 7)
        assert torch.equal(other.layer2[0].conv1.weight, model.layer2[0].conv1.weight)
    assert load(saved, drop_path_rate=0.1).train()(x).requires_grad
    assert torch.equal(load(save(loaded, tmp_path / 'again'))(x), model(x))


# Written by versions that had one kernel for the fusion's two inputs, with the outputs that they computed


@pytest.mark.parametrize('folder', sorted(Path(__file__).with_name('kept').iterdir()), ids=lambda folder: folder.name)
def test_folder_of_an_earlier_version_gives_the_outputs_that_it_gave(hub, folder):
    weights = safetensors.torch.load_file(folder / 'model.safetensors')
    assert any(key.endswith('fusion_conv.weight') for key in weights)
    x, expected = safetensors.torch.load_file(folder / 'outputs.safetensors').values()
    hub.add_repo('owner/kept', {path.name: path.read_bytes() for path in folder.iterdir()})
    by_hand = enliven(load(f'local-dir:{folder}'))
    by_hand.load_state_dict(weights)
    for model in (load(f'local-dir:{folder}'), load('hf-hub:owner/kept'), by_hand):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
        assert not any(key.endswith('fusion_conv.weight') for key in model.state_dict())


def test_checkpoint_of_an_earlier_version_is_the_same_network_bit_for_bit(tmp_path):
    """As train.py writes it, for `--resume` and `--initial-checkpoint`."""
    model = enliven(timm.create_model('regnet_reg_resnet20_convlstm'))
    old = model.state_dict()
    for key in [key for key in old if key.endswith('fusion_conv_x.weight')]:
        parts = old.pop(key), old.pop(key.replace('conv_x', 'conv_h'))
        old[key.replace('conv_x', 'conv')] = torch.cat(parts, dim=1)
    torch.save({'epoch': 4, 'state_dict': old, 'state_dict_ema': old}, tmp_path / 'old.pth.tar')
    for read, kwargs in ((resume_checkpoint, {}), (load_checkpoint, {}), (load_checkpoint, dict(use_ema=True))):
        again = timm.create_model('regnet_reg_resnet20_convlstm').eval()
        read(again, tmp_path / 'old.pth.tar', **kwargs)
        assert torch.equal(again(images(model)), model(images(model)))
    keys = list(old)
    again = load('regnet_reg_resnet20_convlstm', pretrained_cfg_overlay=dict(state_dict=old))
    assert torch.equal(again(images(model)), model(images(model))) and list(old) == keys


@pytest.mark.parametrize(
    'name, made_of, regulate_kwargs, kwargs',
    [
        ('regnet_reg', 'cifar_resnet20', dict(stages=(1,)), {}),
        ('regnet_reg_resnet20_convlstm', 'regnet_reg_resnet20_convlstm', None, dict(regulated_stages=(1,))),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_packaged_weights_bring_their_arguments(tmp_path, monkeypatch, name, made_of, regulate_kwargs, kwargs):
    """As a folder of the project's own, which the registry reads."""
    model = network(made_of, regulate_kwargs, shortcut='pad', **kwargs)
    save(model, tmp_path / f'{name}.tag')
    monkeypatch.setattr(pretrained, 'WEIGHTS_FOLDER', tmp_path)
    cfg = pretrained.trained_cfgs()[f'{name}.tag']
    assert regnet_reg._default_cfgs()[name].cfgs['tag'].file == cfg.file
    loaded, x = load(name, pretrained_cfg=cfg), images(model)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(load(save(loaded, tmp_path / 'again'))(x), model(x))
    features = load(name, pretrained_cfg=cfg, features_only=True)(x)
    assert torch.equal(features[-1], model.forward_features(x))
    with pytest.raises(RuntimeError, match='missing: layer2.0.regulator_bn.weight'):  # the caller's come first
        load(name, pretrained_cfg=cfg, regulated_stages=(2,))
    assert json.loads((tmp_path / 'again/config.json').read_text())['model_args']['regulated_stages'] == [1]


@pytest.mark.parametrize('shortcut', ['conv', 'none'])
def test_init_weights_starts_everything_again(shortcut):
    """Whatever memory holds, as after `to_empty`. The classifier timm's `init_weights` leaves as it is."""
    torch.manual_seed(0)
    model = timm.create_model('regnet_reg_resnet20_convlstm', shortcut=shortcut)
    start = copy.deepcopy(model.state_dict())
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    model.init_weights()
    assert model.layer1[0].bn2.weight.any() == (shortcut == 'none')
    for key, value in model.state_dict().items():
        if value.ndim == 4 and 'fusion_conv_x' not in key:  # a kernel: as large as at the start, and another one
            assert value.std().item() == pytest.approx(start[key].std().item(), rel=0.5), key
            assert not torch.equal(value, start[key]), key
        elif not key.startswith('fc.'):
            assert torch.equal(value, start[key]), key


@pytest.mark.parametrize('name, size', [('cifar_resnet20', 32), ('resnet50d', 224)])
def test_arguments_that_timm_resolves_beforehand_are_the_backbones(name, size):
    model = timm.create_model(**resolve_model_input_args('regnet_reg', backbone=name), device='meta')
    cfg = timm.get_pretrained_cfg(name)
    assert model.num_classes == cfg.num_classes and model.pretrained_cfg['input_size'] == (3, size, size)
    assert (model.pretrained_cfg['mean'], model.pretrained_cfg['first_conv']) == (cfg.mean, cfg.first_conv)
