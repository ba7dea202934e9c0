"""Networks folded for inference by timm's reparameterize_model, exported by torch.export and to ONNX, and in int8.

Every comparison is with the network as it was trained. What needs onnx, onnxruntime and onnxscript is skipped without.
"""

import copy
import os
import shutil
from importlib.util import find_spec

import pytest
import timm
import torch
import torch.nn as nn
from networks import NETS, TINY, assert_close, create, enliven, images, lively
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.layers import StdConv2d
from timm.utils import reparameterize_model
from torch.nn.utils import prune

import timm_regnet_reg
from timm_regnet_reg import __main__ as command_line
from timm_regnet_reg.commands import export
from timm_regnet_reg.errors import UserError

FOLDED = 1e-4  # tolerance, as folding rounds otherwise
# every cell, block and form
typical = pytest.mark.parametrize('net', ['cifar se pad', 'basic blur', 'bottleneck blur'])
with_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in export.PACKAGES),
    reason="onnx, onnxruntime and onnxscript aren't all installed",
)


# Folding


@pytest.mark.parametrize('net', NETS)
def test_reparameterized_network_gives_the_same_outputs(net):
    model = lively(net)
    x = images(model)
    folded, inside_another = reparameterize_model(model), reparameterize_model(nn.Sequential(model))
    synchronised = reparameterize_model(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))
    assert_close(folded(x), model(x), FOLDED)
    assert_close(inside_another(x), model(x), FOLDED)
    for other, same in ((synchronised, folded), (reparameterize_model(inside_another), inside_another)):
        assert torch.equal(other(x), same(x))
    double = copy.deepcopy(model).double()
    assert_close(reparameterize_model(double)(x.double()), double(x.double()), 1e-9)
    for left in (folded, synchronised):
        kinds = {type(module) for stage in left.stages() for module in stage.modules()}
        assert not kinds & {nn.BatchNorm2d, nn.SyncBatchNorm}, 'batch norms outside the stem'
    if net != 'bottleneck blur':  # there a blur comes before the stem's last batch norm
        assert not any(isinstance(module, nn.BatchNorm2d) for module in inside_another.modules())
    assert not [name for name in folded.state_dict() if name.endswith(('pointwise', 'depthwise'))]


@typical
def test_reparameterized_network_says_that_it_trains_no_more_and_the_given_one_does(net):
    model = lively(net)
    x, before = images(model), copy.deepcopy(model.state_dict())
    in_training = reparameterize_model(copy.deepcopy(model).train())
    for folded in (reparameterize_model(model), reparameterize_model(nn.Sequential(model))[0], in_training):
        folded.eval()
        with pytest.raises(RuntimeError, match=r'reparameterised for inference, and trains no more.* call eval\(\)'):
            folded.train()
        assert not any(module.training for module in folded.modules()), 'half in training mode'
        assert_close(folded(x), model(x), FOLDED)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@typical
def test_reparameterized_network_is_copied_saved_and_scripted(net, tmp_path):
    model = lively(net)
    x = images(model)
    folded, other = reparameterize_model(model), reparameterize_model(create(net).eval())
    other.load_state_dict(folded.state_dict())
    torch.save(folded, tmp_path / 'model.pt')
    expected = folded(x)
    for same in (copy.deepcopy(folded), torch.load(tmp_path / 'model.pt', weights_only=False), other):
        assert torch.equal(same(x), expected)
    assert_close(torch.jit.script(folded)(x), expected)


def test_feature_extractors_regulated_and_pruned_networks_are_reparameterized():
    regulated = timm_regnet_reg.regulate(enliven(timm.create_model('resnet18', **TINY)), 'convgru', stages=(2,))
    pruned = copy.deepcopy(regulated)
    pruned.prune_intermediate_layers([2])
    x = images(regulated)
    for model in (lively('cifar', features_only=True), regulated, pruned):
        assert_close(reparameterize_model(model)(x), model(x), FOLDED)


def test_what_users_put_in_place_of_layers_is_reparameterized_as_far_as_it_goes():
    def bare_shortcut(model):
        model.layer2[0].downsample = model.layer2[0].downsample[0]

    def own_stage(model):
        model.layer4 = nn.Conv2d(48, 64, 1)

    def standardised(model):  # its weight isn't what it convolves with
        model.layer1[0].conv2 = StdConv2d(16, 16, 3, padding=1)

    def pruned(model):
        for conv in (model.layer1[0].conv2, model.layer2[0].fusion_conv_x):
            prune.l1_unstructured(conv, 'weight', 0.5)

    def other_eps_and_bias(model):
        model.layer1[0].fusion_bn.eps = 0.1
        model.layer1[0].conv2 = nn.Conv2d(16, 16, 3, padding=1)
        model.layer1[0].fusion_conv_x = nn.Conv2d(16, 16, 1)

    def without_statistics(model):
        for name in ('bn1', 'regulator_bn', 'fusion_bn'):
            setattr(model.layer1[0], name, nn.BatchNorm2d(16, track_running_stats=False))

    for change in (bare_shortcut, own_stage, standardised, pruned, other_eps_and_bias, without_statistics):
        model = lively('basic')
        x = images(model)
        with torch.no_grad():
            change(model)
            assert_close(reparameterize_model(nn.Sequential(model))(x), model(x), FOLDED, change.__name__)


# torch.export and ONNX


@pytest.mark.parametrize('prepare', [copy.deepcopy, reparameterize_model], ids=['as it is', 'reparameterized'])
@pytest.mark.parametrize('net', ['cifar', 'cifar se pad', 'basic', 'bottleneck d'])
def test_exports_for_any_batch_and_image_size(net, prepare):
    if 'cifar' not in net and torch.__version__ < (2, 14):
        pytest.skip(f'torch {torch.__version__} exports pooling for either even or odd sizes')
    model = lively(net)
    dynamic = (dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO),)
    exported = torch.export.export(prepare(model), (images(model),), dynamic_shapes=dynamic).module()
    for batch, size in ((2, (64, 64)), (1, (33, 33)), (5, (65, 97)), (3, (80, 71))):
        x = images(model, batch, size)
        assert_close(exported(x), model(x), FOLDED if prepare is reparameterize_model else 1e-5, str(size))


@with_onnx
@pytest.mark.parametrize('net', ['cifar', 'bottleneck d'])
def test_onnx_runtime_gives_the_same_outputs_for_any_batch_size(net, tmp_path):
    import onnx

    model = lively(net)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=images(model).shape[1:])
    path = tmp_path / 'net.onnx'
    export.export_onnx(model, path)
    onnx_model = export.OnnxModel(path)
    for x in (images(model, batch) for batch in (1, 2, 5)):
        assert_close(onnx_model(x), model(x), FOLDED)
    assert export.largest_difference(model, path) <= 1e-4

    file = onnx.load(path)
    onnx.checker.check_model(file, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [('', export.OPSET)]
    assert 'BatchNormalization' not in {node.op_type for node in file.graph.node}
    assert os.listdir(tmp_path) == ['net.onnx'], 'weights in a second file'
    assert os.path.dirname(timm_regnet_reg.__file__).encode() not in path.read_bytes(), 'paths of this machine'


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
    expected, actual = export.OnnxModel(full)(x), export.OnnxModel(quantized)(x)
    spread = (expected - expected.mean(0)).norm()
    assert 0 < (actual - expected).norm() < 0.15 * spread
    assert quantized.stat().st_size < 0.5 * full.stat().st_size
    graph = onnx.load(quantized).graph
    inexact = {name for node in graph.node if node.op_type == 'DequantizeLinear' for name in node.output}
    for node in graph.node:
        if node.op_type in ('Conv', 'Gemm'):
            grouped = any(a.name == 'group' and a.i > 1 for a in node.attribute)
            assert (node.input[1] in inexact) != grouped, node.name
    weights = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert max(abs(weight.astype(int)).max() for weight in weights) <= 64  # 7 bits


# The command


@pytest.fixture
def data_dir(image_folder, tmp_path):
    for split in ('train', 'validation'):
        shutil.copytree(image_folder / 'validation', tmp_path / 'data' / split)
    return tmp_path / 'data'


@pytest.fixture
def run(capsys):
    """Runs the command; gives its exit code, stdout and stderr."""

    def run(*args):
        code = command_line.main(['export', *map(str, args)])
        return code, *capsys.readouterr()

    return run


@with_onnx
def test_command_writes_both_files_and_prints_difference_and_accuracies(run, packaged, data_dir, tmp_path, monkeypatch):
    onnx_model, opened = export.OnnxModel, []
    monkeypatch.setattr(export, 'OnnxModel', lambda path: opened.append(path.name) or onnx_model(path))
    code, out, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}', '--int8', data_dir)
    assert code == 0
    assert all(label in err for label in ('scoring float32: ', 'calibrating: ', 'scoring int8: '))
    assert sorted(os.listdir(tmp_path)) == ['data', 'net.int8.onnx', 'net.onnx']
    assert opened == ['net.onnx', 'net.onnx', 'net.int8.onnx']  # to compare it, and to score both
    exported, full, quantized = out.splitlines()
    assert f'opset {export.OPSET}' in exported and 'batch x 3 x 32 x 32' in exported and 'differ' in exported
    assert f'{tmp_path}/net.onnx: top-1' in full and '12 images' in full
    assert f'{tmp_path}/net.int8.onnx: top-1' in quantized and '12 images' in quantized


def test_int8_is_calibrated_on_images_as_the_network_is_used_on_them(data_dir, monkeypatch):
    """Training images with the border that `regnet-reg cifar` gives them, in which the recipes crop."""
    for path in (data_dir / 'train').rglob('*.png'):
        ImageOps.expand(Image.open(path), 4).save(path)
    model = create('cifar', num_classes=3, pretrained_cfg_overlay={'label_names': None})
    data_config = resolve_data_config(model=model)
    calibration, scored = export._images(str(data_dir), model, data_config)
    scored.transform = create_transform(**data_config)
    expected = dict(zip(scored.filenames(), (image for image, _ in scored)))
    names = calibration.dataset.filenames()
    assert len(calibration) == 12
    for (image, _), index in zip(calibration, calibration.indices):
        assert torch.equal(image, expected[names[index]])
    monkeypatch.setattr(export, 'CALIBRATION_IMAGES', 8)  # of 12, four a class
    data_config['input_size'] = (3, 40, 40)  # there the border is part of the image
    calibration, _ = export._images(str(data_dir), model, data_config)
    assert len(calibration) == 8 and {label for _, label in calibration} == {0, 1, 2}
    bordered = Image.open(data_dir / 'train' / names[calibration.indices[0]])
    assert torch.equal(calibration[0][0], create_transform(**data_config)(bordered))


@with_onnx
def test_file_that_differs_is_not_kept(run, packaged, tmp_path, monkeypatch):
    (tmp_path / 'net.onnx').write_text('an earlier one')
    monkeypatch.setattr(export, 'export_onnx', lambda model, path: path.write_text('wrong'))
    monkeypatch.setattr(export, 'largest_difference', lambda model, path: 0.01)
    code, _, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}')
    assert code == 1 and 'differs from the PyTorch model by 1.0e-02' in err
    assert os.listdir(tmp_path) == ['net.onnx'] and (tmp_path / 'net.onnx').read_text() == 'an earlier one'


@with_onnx
def test_file_with_outputs_that_are_not_finite_or_wrong_for_a_batch_does_not_pass_for_equal(tmp_path, monkeypatch):
    model = lively('cifar')
    monkeypatch.setattr(export, 'OnnxModel', lambda path: lambda images: model(images).fill_(torch.nan))
    with pytest.raises(UserError, match='bad.onnx: the outputs are not finite'):
        export.largest_difference(model, tmp_path / 'bad.onnx')
    monkeypatch.setattr(
        export, 'OnnxModel', lambda path: lambda images: model(images) * (1.5 if len(images) > 1 else 1)
    )
    assert export.largest_difference(model, tmp_path / 'bad.onnx') == pytest.approx(0.5), 'wrong for one batch size'


@with_onnx
@pytest.mark.parametrize(
    'renamed, message',
    [
        (['validation/ant'], 'its classes, or their order, are not those of DATA/train'),
        (['train/ant', 'validation/ant'], 'not those of the model (missing: ant; added: dog)'),
    ],
)
def test_wrong_data_is_told_before_the_work(run, packaged, data_dir, renamed, message, tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'export_onnx', lambda *args: pytest.fail('the work began'))
    for name in renamed:
        (data_dir / name).rename((data_dir / name).with_name('dog'))
    code, out, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}', '--int8', data_dir)
    assert (code, out) == (1, '') and message.replace('DATA', str(data_dir)) in err
    assert os.listdir(tmp_path) == ['data']


@with_onnx
def test_damaged_image_is_named_and_no_int8_file_left(run, packaged, data_dir, tmp_path, monkeypatch):
    for split in ('train', 'validation'):
        os.truncate(data_dir / split / 'bee/0.png', 1000)
        code, _, err = run(tmp_path / 'net.onnx', '--model', f'local-dir:{packaged}', '--int8', data_dir)
        assert code == 1
        assert err.splitlines()[-1].startswith(f'regnet-reg: error: {data_dir}/{split}/bee/0.png: cannot be read')
        assert sorted(os.listdir(tmp_path)) == ['data', 'net.onnx']
        monkeypatch.setattr(export, 'export_onnx', lambda model, path: shutil.copy(tmp_path / 'net.onnx', path))


@with_onnx
@pytest.mark.parametrize(
    'args, message',
    [
        (['net.pt'], 'ends in .onnx'),
        (['/proc/net.onnx'], 'error: /proc/net.onnx: cannot be written'),
        (['net.onnx', '--model', 'resnet51'], 'Unknown model'),
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
