"""Tools that hook, wrap, prune, shard or train a network by its modules: what works on a plain one works on ours."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from networks import assert_close, lively
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

NETS = ('cifar plain', 'cifar', 'basic', 'partly')
COMPILED = ('cifar', torch.float64), ('basic', torch.float32), ('partly', torch.float32)  # which takes seconds each
nets = pytest.mark.parametrize('net', NETS)


def data(batch=4, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, size, size, generator=generator).to(dtype), torch.arange(batch) % 7


def step(model, x, y):
    """Loss and gradients by name; the gradients stay in the model as well."""
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach(), {name.removeprefix('_orig_mod.'): p.grad for name, p in model.named_parameters()}


def assert_near(actual, expected, tolerance, what=''):
    """Within `tolerance` of the expected tensor's norm."""
    distance = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert distance <= tolerance, f'{what}: off by {distance:.2e} of its norm'


def cells(model):
    return {name: m for name, m in model.named_modules() if name.endswith('.regulator')}


@nets
def test_every_module_is_called_once_and_its_hooks_fire(net):
    model = lively(net)
    calls = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, x, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(data()[0])
    assert calls == dict.fromkeys(dict(model.named_modules()), 1)


@nets
def test_pruned_weights_stay_pruned_through_training(net):
    model = lively(net)
    pruned = [(model.layer1[0].conv2, 'weight')]
    for cell in cells(model).values():
        pruned += [(cell, 'pointwise'), (cell, 'depthwise'), (model.layer1[0].fusion_conv_h, 'weight')]
    for module, name in dict.fromkeys(pruned):
        prune.l1_unstructured(module, name, amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, *data())
        optimizer.step()
    expected = model.eval()(data()[0])
    for module, name in dict.fromkeys(pruned):
        prune.remove(module, name)
        assert (getattr(module, name) == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(model(data()[0]), expected)


@nets
def test_batch_norms_are_split_synchronised_and_frozen(net):
    model, (x, _) = lively(net), data(8)
    expected, in_training = model(x), copy.deepcopy(model).train()(x)
    split = convert_splitbn_model(copy.deepcopy(model), 2).train()
    assert_close(split(x)[:4], copy.deepcopy(model).train()(x[:4]), 1e-4)
    synchronised = convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(type(m) is torch.nn.BatchNorm2d for m in synchronised.modules())
    assert_close(synchronised(x), expected)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model)).train()
    assert_close(frozen(x), expected)
    assert_close(unfreeze_batch_norm_2d(frozen).train()(x), in_training)


@pytest.mark.parametrize('task', [LogitDistillationTask, FeatureDistillationTask], ids=['logits', 'features'])
@nets
def test_distils_as_student_and_as_teacher(net, task):
    for student, teacher in ((net, 'cifar plain'), ('cifar plain', net)):
        student, teacher = lively(student).train(), lively(teacher)
        weights = copy.deepcopy(teacher.state_dict())
        distillation = task(student, teacher, distill_loss_weight=1.0, task_loss_weight=1.0, verbose=False)
        distillation(*data())['loss'].backward()
        assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.15), (torch.float16, 0.1)], ids=['bf16', 'fp16'])
@nets
def test_gradients_under_autocast_are_nearly_float64s(net, dtype, tolerance):
    model, (x, y) = lively(net), data(size=64)
    _, expected = step(copy.deepcopy(model).double(), x.double(), y)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.autocast('cpu', dtype):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    # together, as single layers of a plain network are off by a tenth and more, too
    for part in ('', '.regulator.', '.fusion_conv'):
        names = [name for name in expected if part in name]
        if names:
            actual = torch.cat([model.get_parameter(name).grad.flatten() for name in names])
            assert actual.dtype == torch.float32
            assert_near(actual, torch.cat([expected[name].flatten() for name in names]), tolerance, part or 'all')
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 0.05), (torch.float64, 1e-6)], ids=['bf16', 'float64'])
@nets
def test_checkpointing_and_compiling_change_no_gradients(net, dtype, tolerance):
    model, (x, y) = lively(net).to(dtype), data(dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.float32):
        _, expected = step(model, x, y)
        expected = {name: g.clone() for name, g in expected.items()}
        model.set_grad_checkpointing()
        _, actual = step(model, x, y)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        if (net, dtype) in COMPILED:
            model.set_grad_checkpointing(net == 'cifar')
            torch._dynamo.reset()
            _, actual = step(torch.compile(model, backend='aot_eager', fullgraph=True), x, y)
            for name in expected:
                assert_near(actual[name], expected[name], tolerance, name)


class Casts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


@nets
def test_kernels_are_cast_once_a_stage_under_autocast(net):
    model = lively(net)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), Casts() as casts:
        model(data()[0])
    convolutions = sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules())
    biases = sum(getattr(m, 'bias', None) is not None for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    # the image, and the classifier's bias; three stacks of kernels a cell
    assert casts.count <= convolutions + biases + 2 + 3 * len(cells(model))


# Training in two processes


def sharded(model, modules=()):
    mesh = init_device_mesh('cpu', (2,))
    for module in modules:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {
    'replicated': DistributedDataParallel,
    'sharded': sharded,
    'stages sharded': lambda model: sharded(model, model.stages()),
    'cells sharded': lambda model: sharded(model, cells(model).values()),
}


HALVES = slice(0, 2), slice(2, 4)


def train(model, *parts):
    """The weights after two steps on these parts of the images, each a batch of its own for the batch norms."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    x, y = data(dtype=torch.float64)
    for _ in range(2):
        model.zero_grad()
        for part in parts:
            (F.cross_entropy(model(x[part]), y[part]) / len(parts)).backward()
        optimizer.step()
    weights = {name.removeprefix('module.'): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in weights.items()}


def train_in_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    weights = {}
    for net in NETS:
        for way, wrap in WAYS.items():
            model = lively(net).double()
            model.set_grad_checkpointing(way == 'replicated')
            weights[net, way] = train(wrap(model), HALVES[rank])
    torch.save(weights, f'{folder}/{rank}.pt')
    dist.barrier()
    # DDP and DTensor's caches keep gloo's threads alive, and one that frees a tensor while Python shuts down aborts the
    # process: so it ends without shutting down
    os._exit(0)


def test_two_processes_train_as_one(tmp_path):
    mp.spawn(train_in_two, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f'{rank}.pt') for rank in range(2)]
    for net in NETS:
        expected = train(lively(net).double(), *HALVES)
        for way in WAYS:
            for weights in ranks:
                torch.testing.assert_close(weights[net, way], expected, rtol=1e-9, atol=1e-9)
