"""On a GPU: the networks give what they give on the CPU, with fused time steps and without.

`pytest -m cuda` runs these alone; where there is no GPU they are skipped.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import MODEL
from networks import CELLS
from test_fused import GATES, gradients, images, network
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import timm_regnet_reg
from timm_regnet_reg import fused
from timm_regnet_reg.__main__ import main

DEVICE = 'cuda'
FORMATS = (torch.contiguous_format, torch.channels_last)
# of the norm of what float64 gives on the CPU: the logits', and the largest of the gradients'
TOLERANCES = {
    torch.float64: (1e-12, 1e-10),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (5e-2, 0.2),
    torch.float16: (1e-2, 5e-2),
}

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]


@pytest.fixture(autouse=True)
def full_precision():
    """float32 is float32, and not TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(params=['equations', 'fused'])
def steps(request):
    """Which time steps are used."""
    fused.set_fused(request.param == 'fused')
    yield request.param
    fused.set_fused(False)


# a ConvRNN has no fused steps
every_cell = pytest.mark.parametrize(
    'cell, steps', [(c, 'equations') for c in CELLS] + [(c, 'fused') for c in GATES], indirect=['steps']
)


def small(cell):
    """RegNet-20 and images for it."""
    return network(f'regnet_reg_resnet20_{cell}').to(DEVICE), images(7, 32).to(DEVICE)


def error(actual, expected):
    """Of tensors taken together, relative to the norm of what is expected."""
    actual, expected = (torch.cat([t.detach().double().cpu().flatten() for t in ts]) for ts in (actual, expected))
    return ((actual - expected).norm() / expected.norm()).item()


def assert_close(actual, expected, dtype=torch.float32):
    """Logits, and gradients of the parameters."""
    off = error(actual[:1], expected[:1]), error(actual[1:], expected[1:])
    assert off[0] <= TOLERANCES[dtype][0] and off[1] <= TOLERANCES[dtype][1], f'logits and gradients are off by {off}'


@pytest.mark.parametrize('memory_format', FORMATS, ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('name', ['regnet_reg_resnet20_{}', 'regnet_reg_resnet50_{}'])
@every_cell
def test_outputs_and_gradients_are_those_of_the_cpu(cell, name, dtype, memory_format, steps):
    model = network(name.format(cell))
    x = images(4, 33 if '20' in name else 97)
    expected = gradients(copy.deepcopy(model).double(), x.double())
    half = dtype in (torch.bfloat16, torch.float16)
    model = model.to(DEVICE, torch.float32 if half else dtype, memory_format=memory_format)
    x = x.to(DEVICE, next(model.parameters()).dtype, memory_format=memory_format)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile, torch.autocast(DEVICE, dtype, enabled=half):
        actual = gradients(model, x)
    assert_close(actual, expected, dtype)
    uses_fused_steps = any(event.key.startswith('timm_regnet_reg::') for event in profile.key_averages())
    assert uses_fused_steps == (steps == 'fused' and dtype != torch.float64)


@pytest.mark.parametrize('cell', GATES)
def test_fused_gradients_are_the_same_in_every_run(cell):
    fused.set_fused()
    X = torch.randn(64, 32, 32, 32, device=DEVICE, requires_grad=True)
    W = timm_regnet_reg.cells.CELLS[cell](32).to(DEVICE)()

    def run():
        H, C = getattr(fused, cell)(X, None, None, W)
        H, C = getattr(fused, cell)(X, H, C, W)
        return torch.autograd.grad(H.square().sum(), [X, *W[:3]])  # what the kernels are given

    first = run()
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(), strict=True))
    fused.set_fused(False)


@pytest.mark.parametrize('how', ['checkpointed', 'in CUDA graphs'])
@every_cell
def test_outputs_and_gradients_stay_the_same(cell, how, steps):
    model, x = small(cell)
    expected = gradients(model, x)
    if how == 'checkpointed':
        model.set_grad_checkpointing()
    else:
        model = torch.compile(model, mode='reduce-overhead', fullgraph=True)
    for _ in range(4):  # graphs: warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        actual = gradients(model, x)
    assert_close(actual, expected)
    torch.compiler.reset()


@pytest.mark.parametrize('how', ['TorchScript', 'AOTInductor'])
@torch.no_grad()
def test_deployed_networks_keep_their_outputs(how, tmp_path, steps):
    model, x = small('convlstm')
    if how == 'TorchScript':
        deployed = torch.jit.script(model)
    else:
        package = str(tmp_path / 'model.pt2')
        torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=package)
        deployed = torch._inductor.aoti_load_package(package)
    assert error([deployed(x)], [model(x)]) < 1e-4


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    backend = 'nccl' if DEVICE == 'cuda' else 'gloo'
    dist.init_process_group(backend, init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
@every_cell
def test_distributed_training_keeps_outputs_and_gradients(cell, how, steps, one_process):
    plain, x = small(cell)
    plain.train()
    y = torch.arange(7).to(DEVICE)
    model = copy.deepcopy(plain)
    if how == 'ddp':
        model = DistributedDataParallel(torch.nn.SyncBatchNorm.convert_sync_batchnorm(model))
    else:
        for stage in (model.layer1, model.layer2, model.layer3):
            fully_shard(stage)
        fully_shard(model)
    results = []
    for m in (model, plain):
        out = m(x)
        torch.nn.functional.cross_entropy(out, y).backward()
        grads = [p.grad.full_tensor() if how == 'fsdp' and m is model else p.grad for p in m.parameters()]
        results.append([out, *grads])
    assert_close(*results)


def test_commands_run_on_the_device(packaged, image_folder, tmp_path, capsys):
    model = f'local-dir:{packaged}'
    photo = next((image_folder / 'validation').rglob('*.png'))
    assert main(['classify', str(photo), '--model', model, '--device', DEVICE]) == 0
    on_device = capsys.readouterr().out
    assert main(['classify', str(photo), '--model', model]) == 0
    assert on_device.split()[:2] == capsys.readouterr().out.split()[:2]
    options = ['--data-dir', str(image_folder), '--output', str(tmp_path / 'similarity'), '--device', DEVICE]
    assert main(['similarity', MODEL, *options]) == 0
    assert (tmp_path / 'similarity' / 'similarity.png').exists()
