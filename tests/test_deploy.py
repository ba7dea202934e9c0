"""Networks folded for inference by timm's reparameterize_model, exported by torch.export and to ONNX, and in int8.

Every comparison is with the network as it was trained. What needs onnx, onnxruntime and onnxscript is skipped without.
"""

import copy
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image, ImageOps
from test_equations import enliven
from timm.data import create_transform, resolve_data_config
from timm.layers import BlurPool2d
from timm.utils import reparameterize_model

import timm_regnet_reg
from timm_regnet_reg import __main__ as command_line
from timm_regnet_reg.commands import export
from timm_regnet_reg.errors import UserError

SMALL = dict(layers=(2, 1, 1, 2), channels=(16, 32, 48, 64), num_classes=7)
SMALL_CIFAR = dict(layers=(2, 1, 2), num_classes=7)
NETS = {
    'cifar convrnn': ('regnet_reg_resnet20_convrnn', SMALL_CIFAR),
    'cifar convgru, SE, option A': ('regnet_reg_seresnet20_convgru', dict(SMALL_CIFAR, shortcut='pad')),
    'cifar convlstm': ('regnet_reg_resnet20_convlstm', SMALL_CIFAR),
    'cifar, stage 2 regulated': ('regnet_reg_resnet20_convlstm', dict(SMALL_CIFAR, regulated_stages=(2,))),
    'cifar, plain': ('cifar_resnet20', SMALL_CIFAR),
    'basic': ('regnet_reg_resnet18_convrnn', SMALL),
    'bottleneck': ('regnet_reg_resnet50_convlstm', SMALL),
    'bottleneck, D': ('regnet_reg_resnet50d_convgru', SMALL),
    'bottleneck, SE, groups': ('regnet_reg_seresnext50_32x4d_convlstm', SMALL),
    'bottleneck, stages 1 and 3 regulated': ('regnet_reg_resnet50_convgru', dict(SMALL, regulated_stages=(1, 3))),
    'basic, anti-aliased': ('regnet_reg_resnet18_convlstm', dict(SMALL, aa_layer=BlurPool2d)),
    'bottleneck, anti-aliased, stem without pooling': (
        'regnet_reg_resnet50_convrnn',
        dict(SMALL, aa_layer=BlurPool2d, replace_stem_pool=True),
    ),
    'no shortcut': ('regnet_reg_resnet50_convrnn', dict(SMALL, shortcut='none')),
}
# each cell, block and form once
TYPICAL = ('cifar convgru, SE, option A', 'basic, anti-aliased', 'bottleneck, anti-aliased, stem without pooling')
typical = pytest.mark.parametrize('net', TYPICAL, indirect=True)
FORMS = ('resnet20_convrnn', 'resnet50_convgru', 'resnet20_convlstm')

with_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in export.PACKAGES),
    reason=f"onnx, onnxruntime and onnxscript aren't all installed: {export.INSTALL}",
)


def lively(name, **kwargs):
    """A network in evaluation mode none of whose layers is at its neutral start."""
    return enliven(timm.create_model(name, **kwargs))


@pytest.fixture(params=NETS)
def net(request):
    name, kwargs = NETS[request.param]
    return lively(name, **kwargs)


def small(form):
    return lively(f'regnet_reg_{form}', **(SMALL_CIFAR if 'resnet20' in form else SMALL))


def images_for(model, batch=2, size=None):
    size = size or ((32, 32) if model.pretrained_cfg['input_size'][-1] == 32 else (64, 64))
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert expected.abs().max() > 1e-3
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def batch_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


# Folding


def test_reparameterized_network_gives_the_same_outputs(net):
    x = images_for(net)
    folded = reparameterize_model(net)
    synchronised = reparameterize_model(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)))
    with torch.no_grad():
        assert torch.equal(synchronised(x), folded(x))
    assert not [name for name, m in synchronised.named_modules() if 'layer' in name and isinstance(m, nn.SyncBatchNorm)]
    with torch.no_grad():
        assert_close(folded(x), net(x))
        assert_close(folded.double()(x.double()), copy.deepcopy(net).double()(x.double()), 1e-6)
    left = [name for name in batch_norms(folded) if not name.startswith(('conv1', 'bn1', 'maxpool'))]
    assert not left, 'batch norms outside the stem'
    assert not [name for name in folded.state_dict() if name.endswith(('pointwise', 'depthwise'))]


def test_reparameterized_network_inside_another_module_has_its_stem_folded_too(net):
    x = images_for(net)
    folded = reparameterize_model(nn.Sequential(net))
    with torch.no_grad():
        assert_close(folded(x), net(x))
    if not isinstance(net.maxpool, nn.Sequential):  # there a blur comes before the batch norm
        assert not batch_norms(folded)
    again = reparameterize_model(folded)
    with torch.no_grad():
        assert torch.equal(again(x), folded(x))


@typical
def test_reparameterizing_leaves_the_network_itself_untouched(net):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    reparameterize_model(nn.Sequential(net))
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    net.train()(images_for(net)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize('mode', [(), (True,)], ids=['train()', 'train(True)'])
@typical
def test_reparameterized_network_says_that_it_trains_no_more(net, mode):
    x = images_for(net)
    for folded in (reparameterize_model(net), reparameterize_model(nn.Sequential(net))[0]):
        folded.eval()
        with pytest.raises(RuntimeError, match='reparameterised for inference, and trains no more'):
            folded.train(*mode)
        assert not any(module.training for module in folded.modules()), 'half in training mode'
        with torch.no_grad():
            assert_close(folded.eval()(x), net(x))


def test_network_in_training_mode_is_folded_as_in_evaluation_mode():
    model = lively('regnet_reg_resnet20_convgru', **SMALL_CIFAR)
    x = images_for(model)
    with torch.no_grad():
        expected = model(x)
        assert_close(reparameterize_model(model.train()).eval()(x), expected)


@typical
def test_reparameterized_network_is_copied_saved_and_scripted(net, tmp_path):
    x = images_for(net)
    folded, other = reparameterize_model(net), reparameterize_model(net)
    with torch.no_grad():
        expected = folded(x)
        assert torch.equal(copy.deepcopy(folded)(x), expected)
        torch.save(folded, tmp_path / 'model.pt')
        assert torch.equal(torch.load(tmp_path / 'model.pt', weights_only=False)(x), expected)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(folded.state_dict())
        assert torch.equal(other(x), expected)
        scripted = torch.jit.script(folded)
        assert_close(scripted(x), expected)
        assert_close(torch.jit.freeze(scripted)(x), expected)


def test_reparameterized_feature_extractor_gives_the_same_features():
    model = timm.create_model('regnet_reg_resnet20_convlstm', features_only=True, layers=(2, 1, 1)).eval()
    x = images_for(lively('cifar_resnet20', **SMALL_CIFAR))
    with torch.no_grad():
        for actual, expected in zip(reparameterize_model(model)(x), model(x)):
            assert_close(actual, expected)


def test_pruned_and_regulated_networks_are_reparameterized():
    model = timm_regnet_reg.regulate(lively('resnet18', **SMALL), 'convgru', stages=(2,))
    x = images_for(model)
    for prune in (False, True):
        if prune:
            model.prune_intermediate_layers([2])
        with torch.no_grad():
            assert_close(reparameterize_model(model)(x), model(x))


# torch.export


@pytest.mark.parametrize('form', FORMS)
def test_reparameterized_network_exports_for_any_batch_and_image_size(form):
    if 'resnet20' not in form and torch.__version__ < (2, 14):
        pytest.skip(f'torch {torch.__version__} exports pooling for either even or odd sizes')
    model = small(form)
    any_size = torch.export.Dim.DYNAMIC  # unlike AUTO an error where a size would become a constant
    exported = torch.export.export(
        reparameterize_model(model),
        (images_for(model),),
        dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},),
    )
    for batch, size in ((2, (64, 64)), (1, (33, 33)), (5, (65, 97)), (3, (80, 71))):
        x = images_for(model, batch, size)
        with torch.no_grad():
            assert_close(exported.module()(x), model(x))


# ONNX


def onnx_outputs(path, *batches):
    model = export.OnnxModel(path)
    return [model(images) for images in batches]


@with_onnx
@pytest.mark.parametrize('form', FORMS[1:])
def test_onnx_runtime_gives_the_same_outputs_for_any_batch_size(form, tmp_path):
    import onnx

    model = small(form)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, *images_for(model).shape[2:]))
    path = tmp_path / 'net.onnx'
    export.export_onnx(model, path)
    batches = [images_for(model, batch) for batch in (1, 2, 5)]
    with torch.no_grad():
        for images, logits in zip(batches, onnx_outputs(path, *batches)):
            assert_close(logits, model(images))
    assert export.largest_difference(model, path) <= 1e-4

    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [('', export.OPSET)]
    assert 'BatchNormalization' not in {node.op_type for node in file.graph.node}
    assert os.listdir(tmp_path) == ['net.onnx'], 'weights in a second file'
    assert os.path.dirname(timm_regnet_reg.__file__).encode() not in path.read_bytes(), 'paths of this machine'


@with_onnx
def test_network_that_is_not_folded_goes_to_onnx_as_well(tmp_path):
    model = small('resnet20_convgru')
    path = tmp_path / 'net.onnx'
    torch.onnx.export(
        model,
        (images_for(model),),
        path,
        dynamo=True,
        opset_version=export.OPSET,
        dynamic_shapes=({0: 'batch'},),
        input_names=['images'],
        output_names=['logits'],
        verbose=False,
    )
    x = images_for(model, 3)
    with torch.no_grad():
        assert_close(onnx_outputs(path, x)[0], model(x))


@with_onnx
def test_int8_file_is_smaller_and_nearly_right(tmp_path):
    import onnx
    from sklearn.datasets import load_sample_image

    model = timm.create_model('regnet_reg_resnet20_convlstm', pretrained=True).eval()
    full, quantized = tmp_path / 'net.onnx', tmp_path / 'net.int8.onnx'
    export.export_onnx(model, full)
    photograph = torch.from_numpy(load_sample_image('china.jpg')).permute(2, 0, 1)[None].float()
    photograph = nn.functional.interpolate(photograph, scale_factor=0.5) / 64 - 2
    x = nn.functional.unfold(photograph, 32, stride=32).mT.reshape(-1, 3, 32, 32)  # 60 pieces of it
    export.quantize(full, quantized, x.split(20))
    expected, actual = onnx_outputs(full, x)[0], onnx_outputs(quantized, x)[0]
    spread = (expected - expected.mean(0)).norm()
    assert 0 < (actual - expected).norm() < 0.15 * spread
    assert quantized.stat().st_size < 0.5 * full.stat().st_size
    assert 'DequantizeLinear' in {node.op_type for node in onnx.load(quantized).graph.node}


# The command


@pytest.fixture(scope='session')
def data_dir(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    for split in ('train', 'validation'):
        (folder / split).symlink_to(image_folder / 'validation')
    return folder


@pytest.fixture
def run(capsys):
    """Runs the command; gives its exit code, stdout and stderr."""

    def run(*args):
        code = command_line.main(['export', *map(str, args)])
        return code, *capsys.readouterr()

    return run


@with_onnx
def test_command_writes_both_files_and_prints_difference_and_accuracies(run, packaged, data_dir, tmp_path):
    code, out, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}', '--int8', data_dir)
    assert code == 0
    assert all(label in err for label in ('scoring float32: ', 'calibrating: ', 'scoring int8: '))
    assert sorted(os.listdir(tmp_path)) == ['net.int8.onnx', 'net.onnx']
    exported, full, quantized = out.splitlines()
    assert f'opset {export.OPSET}' in exported and 'batch x 3 x 32 x 32' in exported and 'differ' in exported
    assert f'{tmp_path}/net.onnx: top-1' in full and '12 images' in full
    assert f'{tmp_path}/net.int8.onnx: top-1' in quantized and '12 images' in quantized


def test_int8_is_calibrated_on_images_as_the_network_is_used_on_them(image_folder, tmp_path):
    """Training images with the border that `regnet-reg cifar` gives them, in which the recipes crop."""
    shutil.copytree(image_folder / 'validation', tmp_path / 'validation')
    for path in (tmp_path / 'validation').rglob('*.png'):
        bordered = tmp_path / 'train' / path.parent.name / path.name
        bordered.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.expand(Image.open(path), 4).save(bordered)
    model = timm.create_model(
        'regnet_reg_resnet20_convlstm', num_classes=3, pretrained_cfg_overlay={'label_names': None}
    )
    data_config = resolve_data_config(model=model)
    calibration, scored = export._images(str(tmp_path), model, data_config)
    scored.transform = create_transform(**data_config)
    images = {name: image for (image, _), name in zip(scored, map(Path, scored.filenames()))}
    names = calibration.dataset.filenames()
    assert len(calibration) == 12
    for (image, _), index in zip(calibration, calibration.indices):
        assert torch.equal(image, images[Path(names[index])])


@with_onnx
def test_file_that_differs_is_not_kept(run, packaged, tmp_path, monkeypatch):
    (tmp_path / 'net.onnx').write_text('an earlier one')
    monkeypatch.setattr(export, 'export_onnx', lambda model, path: path.write_text('wrong'))
    monkeypatch.setattr(export, 'largest_difference', lambda model, path: 0.01)
    code, _, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}')
    assert code == 1 and 'differs from the PyTorch model by 1.0e-02' in err
    assert os.listdir(tmp_path) == ['net.onnx'] and (tmp_path / 'net.onnx').read_text() == 'an earlier one'


@with_onnx
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_file_with_outputs_that_are_not_finite_does_not_pass_for_equal(value, tmp_path, monkeypatch):
    model = small('resnet20_convlstm')
    monkeypatch.setattr(export, 'OnnxModel', lambda path: lambda images: model(images).fill_(value))
    with pytest.raises(UserError, match='bad.onnx: the outputs are not finite'):
        export.largest_difference(model, tmp_path / 'bad.onnx')


@pytest.fixture(scope='module')
def exported(packaged, tmp_path_factory):
    path = tmp_path_factory.mktemp('exported') / 'net.onnx'
    export.export_onnx(timm.create_model(f'local-dir:{packaged}', pretrained=True).eval(), path)
    return path


@pytest.fixture
def no_work(monkeypatch):
    """Exporting is the work that nothing may have been done of."""
    monkeypatch.setattr(export, 'export_onnx', lambda *args: pytest.fail('the work began'))


def rename(*folders):
    for folder in folders:
        folder.rename(folder.with_name('dog'))


@pytest.fixture
def own_data(image_folder, tmp_path):
    for split in ('train', 'validation'):
        shutil.copytree(image_folder / 'validation', tmp_path / 'data' / split)
    return tmp_path / 'data'


@with_onnx
@pytest.mark.parametrize(
    'change, message',
    [
        (
            lambda d: rename(d / 'validation/ant'),
            'validation: its classes, or their order, are not those of DATA/train',
        ),
        (lambda d: rename(d / 'train/ant', d / 'validation/ant'), 'not those of the model (missing: ant; added: dog)'),
        (lambda d: shutil.rmtree(d / 'validation/ant'), 'validation: holds 2 classes'),
        (lambda d: [path.unlink() for path in d.glob('validation/*/*')], 'validation: holds no images'),
        (lambda d: shutil.rmtree(d / 'train'), 'train: no such folder'),
    ],
)
def test_wrong_data_is_told_before_the_work(run, packaged, own_data, change, message, tmp_path, no_work):
    change(own_data)
    code, out, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}', '--int8', own_data)
    assert (code, out) == (1, '') and message.replace('DATA', str(own_data)) in err
    assert os.listdir(tmp_path) == ['data']


@with_onnx
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_damaged_image_is_named_and_no_int8_file_left(run, packaged, exported, own_data, split, tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'export_onnx', lambda model, path: shutil.copy(exported, path))
    os.truncate(own_data / split / 'bee/0.png', 1000)
    code, _, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}', '--int8', own_data)
    assert code == 1
    assert err.splitlines()[-1].startswith(f'regnet-reg: error: {own_data}/{split}/bee/0.png: cannot be read')
    assert sorted(os.listdir(tmp_path)) == ['data', 'net.onnx']


@with_onnx
def test_place_that_cannot_be_written_is_told_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, 'load_model', lambda *args: pytest.fail('the work began'))
    code, out, err = run('/proc/net.onnx')
    assert (code, out) == (1, '') and 'error: /proc/net.onnx: cannot be written' in err


@with_onnx
@pytest.mark.parametrize(
    'args, message',
    [
        (['net.pt'], 'ends in .onnx'),
        (['net.onnx', '--model', 'resnet51'], 'Unknown model'),
        (['net.onnx', '--int8', 'nowhere'], 'nowhere/train: no such folder'),
        (['net.onnx', '--int8', ''], 'train: no such folder'),
    ],
    ids=str,
)
def test_bad_arguments_are_named(run, args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*args)
    assert code == 1 and message in err and not out
    assert os.listdir() == []


def test_missing_packages_are_named_with_the_command_that_installs_them(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'find_spec', lambda name: 'found' if name == 'onnx' else None)
    code, _, err = run(tmp_path / 'net.onnx')
    assert code == 1 and 'onnxruntime and onnxscript' in err and 'pip install "timm-regnet-reg[export]"' in err
