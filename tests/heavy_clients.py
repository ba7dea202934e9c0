"""Heavy clients, which no test installs: `python tests/heavy_clients.py [CLIENT ...]` tries those that are installed.

It prints a Markdown table: the largest difference to torch's outputs, relative to the largest of these, or the error
in a few words. Every cell is a process of its own with a time limit: a crash or a hang loses that one alone.
Core ML predicts on Apple's machines alone; here its program is run operation by operation, by torch.
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

import test_clients
import torch
import torch.nn.functional as F
from test_clients import images, lively, outputs
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

NETWORKS = dict(zip(('plain', 'ConvRNN', 'ConvGRU', 'ConvLSTM'), test_clients.NETWORKS))
LIMIT = 600  # seconds a process


def difference(actual, expected):
    return f'{(actual - expected).abs().max() / expected.abs().max():.0e}'


# Deployment


def coreml(model, x, folder):
    import coremltools

    options = dict(compute_precision=coremltools.precision.FLOAT32, convert_to='mlprogram', skip_model_load=True)
    inputs = [coremltools.TensorType('x', x.shape)]
    converted = coremltools.convert(torch.jit.trace(model, x), inputs=inputs, **options)
    return difference(run_mil(converted._mil_program, x), outputs(model, x))


def run_mil(program, x):
    """What Core ML would compute, by torch: the operations that a converted ResNet has."""
    (function,) = program.functions.values()
    values = {next(iter(function.inputs)): x}

    def value(var):
        if var.val is None:
            return values[var.name]
        return torch.as_tensor(var.val) if getattr(var.val, 'ndim', 0) else var.val

    def pad(i):  # before and after each dimension, the last one first
        return torch.as_tensor(i['pad']).view(-1, 2).flip(0).flatten().tolist() if i['pad_type'] == 'custom' else [0, 0]

    def conv(i):
        size = i['strides'].tolist(), 0, i['dilations'].tolist(), int(i['groups'])
        return F.conv2d(F.pad(i['x'], pad(i)), i['weight'], i.get('bias'), *size)

    def max_pool(i):
        padded = F.pad(i['x'], pad(i), value=-torch.inf)
        return F.max_pool2d(padded, i['kernel_sizes'].tolist(), i['strides'].tolist())

    compute = {
        'conv': conv,
        'max_pool': max_pool,
        'batch_norm': lambda i: F.batch_norm(i['x'], i['mean'], i['variance'], i['gamma'], i['beta'], eps=i['epsilon']),
        'linear': lambda i: F.linear(i['x'], i['weight'], i['bias']),
        'reduce_mean': lambda i: i['x'].mean(i['axes'].tolist(), keepdim=bool(i['keep_dims'])),
        'reshape': lambda i: i['x'].reshape(i['shape'].tolist()),
        **{name: lambda i, f=getattr(torch, name): f(i['x']) for name in ('relu', 'sigmoid', 'tanh')},
        **{name: lambda i, f=getattr(torch, name): f(i['x'], i['y']) for name in ('add', 'sub', 'mul')},
    }
    for op in function.operations:
        if op.op_type != 'const':
            values[op.outputs[0].name] = compute[op.op_type]({k: value(v) for k, v in op.inputs.items()})
    return values[function.outputs[0].name]


def ncnn(model, x, folder):
    import ncnn
    import pnnx

    pnnx.export(model, 'model.pt', x, fp16=False)
    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    assert net.load_param('model.ncnn.param') == net.load_model('model.ncnn.bin') == 0, 'ncnn refuses the network'
    extractor = net.create_extractor()
    extractor.input('in0', ncnn.Mat(x[0].numpy()).clone())
    return difference(torch.tensor(extractor.extract('out0')[1].numpy())[None], outputs(model, x))


def openvino(model, x, folder):
    import openvino

    converted = openvino.convert_model(model, example_input=x)
    compiled = openvino.compile_model(converted, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return difference(torch.from_numpy(compiled(x.numpy())[0]), outputs(model, x))


def executorch(model, x, folder):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    program = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    delegates = sum('executorch_call_delegate' in str(n.target) for n in program.exported_program().graph.nodes)
    loaded = Runtime.get().load_program(program.to_executorch().buffer)  # kept, as its methods need it
    found = difference(loaded.load_method('forward').execute([x])[0], outputs(model, x))
    return f'{found}, delegates: {delegates}'


def aotinductor(model, x, folder):
    path = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=f'{folder}/m.pt2')
    return difference(outputs(torch._inductor.aoti_load_package(path), x), outputs(model, x))


# Quantisation: the differences are those of int8


def nncf(model, x, folder):
    import nncf

    quantized = nncf.quantize(model, nncf.Dataset([images(1, seed) for seed in range(8)]))
    return difference(outputs(quantized, x), outputs(model, x))


def pt2e(model, x, folder):
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = xnnpack_quantizer.get_symmetric_quantization_config()
    quantizer = xnnpack_quantizer.XNNPACKQuantizer().set_global(config)
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for seed in range(8):
        outputs(prepared, images(1, seed))
    return difference(outputs(convert_pt2e(prepared), x), outputs(model, x))


def fx(model, x, folder):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(model, get_default_qconfig_mapping('x86'), (x,))
    for seed in range(8):
        outputs(prepared, images(1, seed))
    return difference(outputs(convert_fx(prepared), x), outputs(model, x))


# Training


def opacus(model, x, folder):
    """Per-sample gradients by expanded weights against each image's alone; group norms, as it has no others."""
    from opacus.grad_sample import GradSampleModuleExpandedWeights
    from opacus.validators import ModuleValidator

    model, x, y = ModuleValidator.fix(model), images(3), torch.arange(3)
    wrapped = GradSampleModuleExpandedWeights(copy.deepcopy(model), loss_reduction='sum')
    F.cross_entropy(wrapped(x), y, reduction='sum').backward()
    found = torch.cat([p.grad_sample.flatten(1) for p in wrapped.parameters()], 1)
    for i in range(3):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[[i]]), y[[i]]), list(model.parameters()))
        found[i] -= torch.cat([gradient.flatten() for gradient in gradients])
    return f'{found.abs().max():.0e}'


def thop(model, x, folder):
    """Multiply-adds that it sees, of those that torch's own counter sees."""
    import thop

    with FlopCounterMode(display=False) as counter:
        outputs(model, x)
    return f'{2 * thop.profile(copy.deepcopy(model), (x,), verbose=False)[0] / counter.get_total_flops():.1%}'


def torch_pruning(model, x, folder):
    before = sum(p.numel() for p in model.parameters())
    test_clients.test_torch_pruning_ends_and_leaves_the_cells_alone(model)
    return f'{sum(p.numel() for p in model.parameters()) / before:.0%} of the parameters left'


# function, its distribution, what is tried, whether the network is reparameterised first
ROWS = [
    (coreml, 'coremltools', 'convert of the traced network', False),
    (coreml, 'coremltools', 'the same, reparameterised', True),
    (ncnn, 'pnnx', 'export, run by ncnn', False),
    (ncnn, 'pnnx', 'the same, reparameterised', True),
    (openvino, 'openvino', 'convert_model', False),
    (openvino, 'openvino', 'the same, reparameterised', True),
    (executorch, 'executorch', 'XNNPACK', False),
    (executorch, 'executorch', 'the same, reparameterised', True),
    (aotinductor, 'torch', 'AOTInductor', False),
    (nncf, 'nncf', 'quantize, int8', False),
    (nncf, 'nncf', 'the same, reparameterised', True),
    (pt2e, 'torchao', 'PT2E, int8', False),
    (fx, 'torch', 'FX quantisation, int8', False),
    (fx, 'torch', 'the same, reparameterised', True),
    (opacus, 'opacus', 'per-sample gradients by "ew"', False),
    (torch_pruning, 'torch-pruning', 'MagnitudePruner, ratio 0.5', False),
    (thop, 'thop', 'multiply-adds counted', False),
]


def run(row, network):
    """A cell of the table, in this process."""
    function, _, _, reparameterised = ROWS[row]
    torch.set_num_threads(1)
    model = lively(NETWORKS[network])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            return function(reparameterize_model(model) if reparameterised else model, images(1), folder)
        except Exception as error:
            traceback.print_exc()
            return f'{type(error).__name__}: {" ".join(str(error).split())[:90]}'.replace('|', '/')


def cell(row, network):
    """The same, in a process of its own."""
    command = [sys.executable, '-W', 'ignore', os.path.abspath(__file__), '--cell', str(row), network]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f'not done after {LIMIT} s'
    found = re.findall('^found: (.*)', done.stdout, re.M)
    return found[-1] if found else f'the process ended with {done.returncode}'


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('clients', nargs='*', help=f'of {", ".join(dict.fromkeys(row[0].__name__ for row in ROWS))}')
    parser.add_argument('--cell', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        return print('\nfound:', run(int(args.cell[0]), args.cell[1]), flush=True)
    print(f'| client | version | what | {" | ".join(NETWORKS)} |\n|---|---|---|{"---|" * len(NETWORKS)}', flush=True)
    for row, (function, distribution, what, _) in enumerate(ROWS):
        if args.clients and function.__name__ not in args.clients:
            continue
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            print(f'{distribution} is not installed', file=sys.stderr)
        else:
            found = ' | '.join(cell(row, network) for network in NETWORKS)
            print(f'| {distribution} | {version} | {what} | {found} |', flush=True)


if __name__ == '__main__':
    main()
