"""Client libraries, really installed: what they do with a plain ResNet they do with a regulated one.

Compared are numbers, with torch's own, of networks in which the regulators' state counts: the start, at which a
regulated network is its plain backbone, would hide it. What is too heavy for a test's installation: heavy_clients.py.
"""

import copy

import pytest
import timm
import torch
from networks import TINY, assert_close
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from timm_regnet_reg.pretrained import WEIGHTS_FOLDER

NETWORKS = ('resnet18', 'regnet_reg_resnet18_convrnn', 'regnet_reg_resnet18_convgru', 'regnet_reg_resnet18_convlstm')


def images(batch=2, seed=0, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def lively(name, **kwargs):
    """A network in evaluation mode with weights, fusions, cells and batch statistics as after a training."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, zero_init_last=False, **kwargs)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if 'fusion_conv' in module_name or module_name.endswith('regulator'):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        for seed in range(10):
            model.train()(images(4, seed))
    return model.eval()


@pytest.fixture(params=NETWORKS)
def model(request):
    return lively(request.param, **TINY)


def client(module):
    return pytest.importorskip(module, reason=f'{module} is not installed: pip install ".[clients]"')


def outputs(model, x):
    with torch.no_grad():
        return model(x)


def grad_cam(model, x, label):
    """The map of the last stage by torch alone, (B, height, width)."""
    features = model.forward_features(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.forward_head(features)[:, label].sum(), features)
    return (features * gradient.mean((2, 3), keepdim=True)).sum(1).relu().detach()


@pytest.mark.parametrize('name', NETWORKS[1:])
def test_the_state_counts_in_these_networks(name):
    model = lively(name, **TINY)
    with_state = outputs(model, images())
    for module_name, module in model.named_modules():
        if module_name.endswith('regulator_bn'):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    assert (outputs(model, images()) - with_state).abs().max() > 0.05 * with_state.abs().max()


@pytest.mark.parametrize('library', ['pytorch_grad_cam', 'torchcam', 'captum'])
def test_the_last_block_is_explained(library, model):
    client(library)
    x, block, expected = images(1), model.layer4[-1], grad_cam(model, images(1), label=3)
    if library == 'captum':
        from captum.attr import LayerGradCam

        found = LayerGradCam(model, block).attribute(x, target=3, relu_attributions=True)[:, 0].detach()
    elif library == 'torchcam':
        from torchcam.methods import GradCAM

        with GradCAM(model, target_layer=block) as extractor:
            (found,) = extractor(3, model(x))
        expected = (expected - expected.min()) / (expected - expected.min()).max()
    else:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import scale_cam_image
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with GradCAM(model=model, target_layers=[block]) as cam:
            found = torch.from_numpy(cam(input_tensor=x, targets=[ClassifierOutputTarget(3)]))
        expected = torch.from_numpy(scale_cam_image(expected.numpy(), (64, 64)))
    assert_close(found, expected)


def test_peft_adapts_the_fusions(model):
    client('peft')
    from peft import LoraConfig, get_peft_model

    layers = [name for name, _ in model.named_modules() if 'fusion_conv' in name] or ['layer4.1.conv2']
    expected = copy.deepcopy(model)
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=6, target_modules=layers, init_lora_weights=False)
    ).eval()
    before = outputs(expected, images())
    with torch.no_grad():
        for name in layers:
            layer = adapted.base_model.model.get_submodule(name)
            A, B = layer.lora_A['default'].weight, layer.lora_B['default'].weight
            expected.get_submodule(name).weight += 3 * torch.einsum('or,rikl->oikl', B[:, :, 0, 0], A)
    found = outputs(adapted, images())
    assert (found - before).abs().max() > 1e-3 * before.abs().max()
    assert_close(found, outputs(expected, images()))
    assert_close(outputs(adapted.merge_and_unload(), images()), outputs(expected, images()))


def test_torchinfo_counts_all_parameters_and_nearly_all_operations(model):
    torchinfo = client('torchinfo')
    summary = torchinfo.summary(model, input_data=images(1), verbose=0)
    assert summary.total_params == sum(parameter.numel() for parameter in model.parameters())
    with FlopCounterMode(display=False) as counter:
        outputs(model, images(1))
    assert summary.total_mult_adds == pytest.approx(counter.get_total_flops() / 2, rel=0.05)


@pytest.mark.filterwarnings('ignore')  # of the older exporter
def test_onnx2torch_brings_a_reparameterised_network_back(model, tmp_path):
    onnx2torch = client('onnx2torch')
    import onnx

    path = str(tmp_path / 'model.onnx')
    # onnx2torch knows operations up to opset 18, and not all of that
    torch.onnx.export(reparameterize_model(model), (images(1),), path, dynamo=False, opset_version=13)
    converted = onnx2torch.convert(distinct_initializers(onnx.load(path)))
    assert_close(outputs(converted, images(1)), outputs(model, images(1)))


def distinct_initializers(onnx_model):
    """The model with equal weights written out: torch's exporter keeps one, and onnx2torch doesn't find the others."""
    graph = onnx_model.graph
    weights = {weight.name: weight for weight in graph.initializer}
    for node in [node for node in graph.node if node.op_type == 'Identity' and node.input[0] in weights]:
        graph.initializer.add().CopyFrom(weights[node.input[0]])
        graph.initializer[-1].name = node.output[0]
        graph.node.remove(node)
    return onnx_model


@pytest.mark.filterwarnings('ignore:Unwrapped parameters')
def test_torch_pruning_ends_and_leaves_the_cells_alone(model):
    torch_pruning = client('torch_pruning')
    before = {name: parameter.shape for name, parameter in model.named_parameters()}
    torch_pruning.MagnitudePruner(
        model, images(1), torch_pruning.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=[model.fc]
    ).step()
    after = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert sum(map(torch.Size.numel, after.values())) < 0.5 * sum(map(torch.Size.numel, before.values()))
    assert all(before[name] == after[name] for name in before if '.regulator.' in name)
    model.train()(images()).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('name', NETWORKS[1:])
def test_transformers_starts_a_regulated_network_from_plain_weights(name, tmp_path):
    client('transformers')
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture='resnet18', num_labels=10, model_args=TINY)
    for network in (lively('resnet18', **TINY), lively(name, **TINY)):  # of its own, cells and fusions are loaded too
        saved = TimmWrapperForImageClassification(config)
        saved.timm_model.load_state_dict(network.state_dict())
        saved.save_pretrained(tmp_path)
        config.architecture = name
        loaded = TimmWrapperForImageClassification.from_pretrained(tmp_path, config=config).eval()
        assert_close(loaded(images()).logits, network(images()))
        state = copy.deepcopy(loaded.state_dict())
        for stage in loaded.timm_model.stages():
            stage.init_non_persistent_buffers()  # it is done already
        assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())


def test_transformers_loads_packaged_networks(packaged):
    client('transformers')
    from transformers import AutoModelForImageClassification

    for folder in (packaged, *(file.parent for file in WEIGHTS_FOLDER.glob('*/config.json'))):
        network = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
        assert_close(outputs(loaded, images(size=32)).logits, outputs(network, images(size=32)))
        assert list(loaded.config.id2label.values()) == network.pretrained_cfg['label_names']


def test_accelerate_loads_a_whole_checkpoint_and_no_other(model, tmp_path):
    accelerate = client('accelerate')
    from safetensors.torch import save_file

    def load(state_dict):
        save_file(state_dict, tmp_path / 'model.safetensors', metadata={'format': 'pt'})
        with accelerate.init_empty_weights():
            empty = timm.create_model(model.pretrained_cfg['architecture'], num_classes=10, **TINY)
        return accelerate.load_checkpoint_and_dispatch(
            empty, str(tmp_path / 'model.safetensors'), device_map={'': 'cpu'}
        ).eval()

    assert_close(outputs(load(model.state_dict()), images()), outputs(model, images()))
    if any('fusion' in name for name in model.state_dict()):
        with pytest.raises(NotImplementedError, match='meta tensor'):
            load(lively('resnet18', **TINY).state_dict())
