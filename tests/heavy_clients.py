"""Heavy clients, which no test installs: run each that is installed on a plain and on the regulated networks.

    python tests/heavy_clients.py [CLIENT ...]

prints a Markdown table: "works" with the largest difference to torch's outputs, relative to the largest of these, or the
error in a few words. Every client and network is a process of its own with a time limit: a crash or a hang loses one
cell of the table. On Linux, Core ML can't predict; its program is run operation by operation instead.
"""

import argparse
import contextlib
import copy
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import traceback

import timm
import torch
import torch.nn.functional as F
from test_clients import distinct_initializers, images, lively
from timm.utils import reparameterize_model

NETWORKS = {'plain': 'resnet18', **{cell: f'regnet_reg_resnet18_{cell.lower()}' for cell in ('ConvRNN', 'ConvGRU', 'ConvLSTM')}}
LIMIT = 400  # seconds a process


def difference(actual, expected):
    return f'{(actual - expected).abs().max() / expected.abs().max():.0e}'


def outputs(model, x):
    with torch.no_grad():
        return model(x)


# Deployment


def run_mil(program, x):
    """What Core ML would compute, by torch, of the operations that a converted ResNet has."""
    (function,) = program.functions.values()
    values = {next(iter(function.inputs)): x}

    def value(var):
        if var.val is not None:
            return torch.as_tensor(var.val) if getattr(var.val, 'ndim', 0) else var.val
        return values[var.name]

    def pad(i):  # before and after, last dimension first, as F.pad wants it
        before_and_after = [int(p) for p in i['pad']]
        return before_and_after[2:] + before_and_after[:2] if str(i['pad_type']) == 'custom' else [0] * 4

    def average(i):
        kernel, strides = i['kernel_sizes'].tolist(), i['strides'].tolist()
        return F.avg_pool2d(i['x'], kernel, strides, 0, bool(i['ceil_mode']), not i['exclude_padding_from_average'])

    compute = {
        'conv': lambda i: F.conv2d(
            F.pad(i['x'], pad(i)), i['weight'], i.get('bias'), i['strides'].tolist(), 0, i['dilations'].tolist(), i['groups']
        ),
        'batch_norm': lambda i: F.batch_norm(
            i['x'], i['mean'], i['variance'], i['gamma'], i['beta'], eps=float(i['epsilon'])
        ),
        'max_pool': lambda i: F.max_pool2d(
            F.pad(i['x'], pad(i), value=-torch.inf), i['kernel_sizes'].tolist(), i['strides'].tolist()
        ),
        'avg_pool': average,
        'relu': lambda i: F.relu(i['x']),
        'sigmoid': lambda i: torch.sigmoid(i['x']),
        'tanh': lambda i: torch.tanh(i['x']),
        'add': lambda i: i['x'] + i['y'],
        'sub': lambda i: i['x'] - i['y'],
        'mul': lambda i: i['x'] * i['y'],
        'reduce_mean': lambda i: i['x'].mean(i['axes'].tolist(), keepdim=bool(i['keep_dims'])),
        'reshape': lambda i: i['x'].reshape(i['shape'].tolist()),
        'squeeze': lambda i: i['x'].squeeze(i['axes'].tolist()),
        'linear': lambda i: F.linear(i['x'], i['weight'], i.get('bias')),
        'identity': lambda i: i['x'],
    }
    for op in function.operations:
        if op.op_type != 'const':
            values[op.outputs[0].name] = compute[op.op_type]({k: value(v) for k, v in op.inputs.items()})
    return values[function.outputs[0].name]


def coreml(model, x, folder):
    import coremltools

    traced = torch.jit.trace(model, x)
    options = dict(convert_to='mlprogram', compute_precision=coremltools.precision.FLOAT32, skip_model_load=True)
    converted = coremltools.convert(traced, inputs=[coremltools.TensorType('x', x.shape)], **options)
    return difference(run_mil(converted._mil_program, x), outputs(model, x))


def ncnn(model, x, folder):
    import ncnn
    import pnnx

    pnnx.export(model, f'{folder}/model.pt', x, fp16=False)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(f'{folder}/model.ncnn.param')
    net.load_model(f'{folder}/model.ncnn.bin')
    extractor = net.create_extractor()
    extractor.input('in0', ncnn.Mat(x[0].numpy()).clone())
    return difference(torch.tensor(extractor.extract('out0')[1].numpy())[None], outputs(model, x))


def openvino(model, x, folder):
    import openvino

    compiled = openvino.compile_model(
        openvino.convert_model(model, example_input=x), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'}
    )
    return difference(torch.from_numpy(compiled(x.numpy())[0]), outputs(model, x))


def executorch(model, x, folder):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    graph = program.exported_program().graph
    delegates = sum('executorch_call_delegate' in str(node.target) for node in graph.nodes)
    loaded = Runtime.get().load_program(program.to_executorch().buffer)  # kept, as its methods need it
    found = difference(loaded.load_method('forward').execute([x])[0], outputs(model, x))
    return f'{found}, {delegates} delegate{"s" * (delegates > 1)}'


def aotinductor(model, x, folder):
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(model, (x,)), package_path=f'{folder}/model.pt2'
    )
    return difference(outputs(torch._inductor.aoti_load_package(package), x), outputs(model, x))


def onnx2torch(model, x, folder):
    import onnx
    import onnx2torch

    torch.onnx.export(model, (x,), f'{folder}/model.onnx', dynamo=False, opset_version=13)
    converted = onnx2torch.convert(distinct_initializers(onnx.load(f'{folder}/model.onnx')))
    return difference(outputs(converted, x), outputs(model, x))


# Quantisation: the difference is int8's


def nncf(model, x, folder):
    import nncf

    quantized = nncf.quantize(model, nncf.Dataset([images(1, seed) for seed in range(8)]))
    return difference(outputs(quantized, x), outputs(model, x))


def pt2e(model, x, folder):
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for seed in range(8):
        outputs(prepared, images(1, seed))
    return difference(outputs(convert_pt2e(prepared), x), outputs(model, x))


def fx_quantization(model, x, folder):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping('x86'), (x,))
    for seed in range(8):
        outputs(prepared, images(1, seed))
    return difference(outputs(convert_fx(prepared), x), outputs(model, x))


# Training


def transformers(model, x, folder):
    """A plain network's weights in a regulated network's config: the start as `init_weights` makes it."""
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    plain = lively('resnet18')
    config = TimmWrapperConfig(architecture='resnet18', num_labels=plain.num_classes)
    saved = TimmWrapperForImageClassification(config)
    saved.timm_model.load_state_dict(plain.state_dict())
    saved.save_pretrained(folder)
    config.architecture = model.pretrained_cfg['architecture']
    loaded = TimmWrapperForImageClassification.from_pretrained(folder, config=config).eval()
    loaded.save_pretrained(f'{folder}/again')
    again = TimmWrapperForImageClassification.from_pretrained(f'{folder}/again').eval()
    torch.testing.assert_close(outputs(again, x).logits, outputs(loaded, x).logits)
    return difference(outputs(loaded, x).logits, outputs(plain, x))


def accelerate(model, x, folder):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from safetensors.torch import save_file

    def load(state_dict):
        save_file(state_dict, f'{folder}/model.safetensors')
        with init_empty_weights():
            empty = timm.create_model(model.pretrained_cfg['architecture'], num_classes=model.num_classes)
        return load_checkpoint_and_dispatch(empty, f'{folder}/model.safetensors', device_map={'': 'cpu'}).eval()

    found = difference(outputs(load(model.state_dict()), x), outputs(model, x))
    if 'regnet' in model.pretrained_cfg['architecture']:
        try:
            load(lively('resnet18').state_dict())
        except NotImplementedError as error:
            return f'{found}; plain weights: {str(error).split(";")[0].lower()}'
        raise AssertionError('plain weights were loaded without the regulators')
    return found


def opacus(model, x, folder):
    """Per-sample gradients by expanded weights against those of each image alone; group norms, as it has no others."""
    from opacus.grad_sample import GradSampleModuleExpandedWeights
    from opacus.validators import ModuleValidator

    model = ModuleValidator.fix(model)
    x, y = images(3), torch.arange(3)
    expected = []
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        expected.append({name: p.grad for name, p in model.named_parameters()})
    model.zero_grad()
    wrapped = GradSampleModuleExpandedWeights(copy.deepcopy(model), loss_reduction='sum')
    F.cross_entropy(wrapped(x), y, reduction='sum').backward()
    samples = {name.removeprefix('_module.'): p.grad_sample for name, p in wrapped.named_parameters()}
    found = torch.cat([samples[name].flatten() for name in expected[0]])
    return difference(found, torch.cat([torch.stack([e[name] for e in expected]).flatten() for name in expected[0]]))


def torch_pruning(model, x, folder):
    import torch_pruning

    before = sum(p.numel() for p in model.parameters())
    importance = torch_pruning.importance.MagnitudeImportance()
    pruner = torch_pruning.MagnitudePruner(model, x, importance, pruning_ratio=0.5, ignored_layers=[model.fc])
    pruner.step()
    assert outputs(model, x).isfinite().all()
    return f'{sum(p.numel() for p in model.parameters()) / before:.0%} of the parameters left'


def peft(model, x, folder):
    from peft import LoraConfig, get_peft_model

    pattern = r'.*\.(conv1|fusion_conv_[xh])'
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=pattern, init_lora_weights=False)).eval()
    assert (outputs(adapted, x) - outputs(model, x)).abs().max() > 1e-3
    count = sum(hasattr(m, 'lora_A') for m in adapted.modules())
    return f'{count} adapters, merged {difference(outputs(copy.deepcopy(adapted).merge_and_unload(), x), outputs(adapted, x))}'


# Counters: multiply-adds that they see, of those that torch's own counter sees


def multiply_adds(model, x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        outputs(model, x)
    return counter.get_total_flops() / 2


def thop(model, x, folder):
    import thop

    count, parameters = thop.profile(copy.deepcopy(model), (x,), verbose=False)
    share = parameters / sum(p.numel() for p in model.parameters())
    return f'{count / multiply_adds(model, x):.1%}, parameters {share:.1%}'


def torchinfo(model, x, folder):
    import torchinfo

    summary = torchinfo.summary(model, input_data=x, verbose=0)
    share = summary.total_params / sum(p.numel() for p in model.parameters())
    return f'{summary.total_mult_adds / multiply_adds(model, x):.1%}, parameters {share:.1%}'


def ptflops(model, x, folder):
    import ptflops

    options = dict(as_strings=False, print_per_layer_stat=False, verbose=False)
    found = []
    for backend in ('pytorch', 'aten'):
        count, parameters = ptflops.get_model_complexity_info(model, tuple(x.shape[1:]), backend=backend, **options)
        found.append(f'{backend} {count / multiply_adds(model, x):.1%}')
    return ', '.join(found)


# function, its distribution, what is tried, whether the network is reparameterised first
ROWS = {
    'coreml': (coreml, 'coremltools', 'convert', False),
    'coreml-reparameterised': (coreml, 'coremltools', 'convert, reparameterised', True),
    'ncnn': (ncnn, 'pnnx', 'pnnx.export, run by ncnn', False),
    'ncnn-reparameterised': (ncnn, 'pnnx', 'pnnx.export, run by ncnn, reparameterised', True),
    'openvino': (openvino, 'openvino', 'convert_model', False),
    'openvino-reparameterised': (openvino, 'openvino', 'convert_model, reparameterised', True),
    'executorch': (executorch, 'executorch', 'XNNPACK', False),
    'executorch-reparameterised': (executorch, 'executorch', 'XNNPACK, reparameterised', True),
    'aotinductor': (aotinductor, 'torch', 'AOTInductor', False),
    'onnx2torch-reparameterised': (onnx2torch, 'onnx2torch', 'convert, reparameterised', True),
    'nncf': (nncf, 'nncf', 'quantize', False),
    'nncf-reparameterised': (nncf, 'nncf', 'quantize, reparameterised', True),
    'pt2e': (pt2e, 'torchao', 'PT2E quantisation', False),
    'fx-quantization': (fx_quantization, 'torch', 'FX quantisation', False),
    'fx-quantization-reparameterised': (fx_quantization, 'torch', 'FX quantisation, reparameterised', True),
    'transformers': (transformers, 'transformers', 'TimmWrapper with plain weights', False),
    'accelerate': (accelerate, 'accelerate', 'init_empty_weights, load_checkpoint_and_dispatch', False),
    'opacus': (opacus, 'opacus', 'grad_sample_mode="ew"', False),
    'torch-pruning': (torch_pruning, 'torch-pruning', 'MagnitudePruner', False),
    'peft': (peft, 'peft', 'LoRA on conv1 and the fusions', False),
    'thop': (thop, 'thop', 'profile', False),
    'torchinfo': (torchinfo, 'torchinfo', 'summary', False),
    'ptflops': (ptflops, 'ptflops', 'get_model_complexity_info', False),
}


def run(client, networks):
    """The client's cells of the table, in this process: a line each."""
    function, _, _, reparameterised = ROWS[client]
    torch.set_num_threads(1)
    for network in networks:
        model = lively(NETWORKS[network])
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            try:
                found = function(reparameterize_model(model) if reparameterised else model, images(1), folder)
            except Exception as error:
                traceback.print_exc()
                found = f'{type(error).__name__}: {" ".join(str(error).split())[:90]}'.replace('|', '/')
        print(f'\n{network}: {found}', flush=True)


def cells(client):
    """The client's cells of the table, by processes of their own: one more whenever one dies or hangs."""
    found = {}
    while rest := [network for network in NETWORKS if network not in found]:
        command = [sys.executable, '-W', 'ignore', os.path.abspath(__file__), client, '--networks', *rest]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
            output, end = done.stdout, f'the process ended with {done.returncode}'
        except subprocess.TimeoutExpired as error:
            output, end = (error.stdout or b'').decode(), f'not done after {LIMIT} s'
        found.update(re.findall(f'^({"|".join(rest)}): (.*)', output, re.M))
        found.setdefault(next((network for network in rest if network not in found), rest[-1]), end)
    return [found[network] for network in NETWORKS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('clients', nargs='*', metavar='CLIENT', help=f'of {", ".join(ROWS)} (default: all)')
    parser.add_argument('--networks', nargs='+', help='try these with one client, in this process')
    args = parser.parse_args()
    if args.networks:
        return run(*args.clients, args.networks)
    print(f'| client | version | what | {" | ".join(NETWORKS)} |\n|---|---|---|{"---|" * len(NETWORKS)}', flush=True)
    for client in args.clients or ROWS:
        _, distribution, what, _ = ROWS[client]
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            print(f'| {distribution} | not installed | {what} |{" |" * len(NETWORKS)}', flush=True)
            continue
        print(f'| {distribution} | {version} | {what} | {" | ".join(cells(client))} |', flush=True)


if __name__ == '__main__':
    main()
