"""Tools that hook, wrap, prune, shard or train a network by its modules: what works on a plain one works on ours."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_equations import enliven
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d, unfreeze_batch_norm_2d
from timm.task import FeatureDistillationTask, LogitDistillationTask
from timm.utils import ModelEmaV3
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import timm_regnet_reg  # noqa: F401  (registers the models)

TINY = dict(layers=(2, 1, 1, 2), channels=(16, 32, 48, 64))
NETS = {
    'plain': ('cifar_resnet20', dict(layers=(2, 1, 2))),
    'convlstm': ('regnet_reg_resnet20_convlstm', dict(layers=(2, 1, 2))),
    'convgru': ('regnet_reg_seresnet50_convgru', TINY),
    'convrnn': ('regnet_reg_resnet18_convrnn', dict(TINY, regulated_stages=(1, 4))),
}
nets = pytest.mark.parametrize('net', NETS)


def create(net):
    name, kwargs = NETS[net]
    return enliven(timm.create_model(name, num_classes=7, **kwargs))


def data(batch=4, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, size, size, generator=generator), torch.arange(batch) % 7


def step(model, x, y):
    """Loss and gradients by name; the gradients stay in the model as well."""
    model.zero_grad()
    loss = F.cross_entropy(model(x).float(), y)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_near(actual, expected, tolerance, what=''):
    """Within `tolerance` of the expected tensor's norm."""
    distance = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
    assert distance <= tolerance, f'{what}: off by {distance:.2e} of its norm'


def cells(model):
    return {name: m for name, m in model.named_modules() if name.endswith('.regulator')}


@nets
def test_every_module_is_called_once_and_its_hooks_fire(net):
    model = create(net)
    calls = {}
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, x, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(data()[0])
    assert calls == dict.fromkeys(dict(model.named_modules()), 1)


@nets
def test_pruned_weights_stay_pruned_through_training(net):
    model = create(net)
    pruned = [(model.layer1[0].conv2, 'weight')]
    for cell in cells(model).values():
        pruned += [(cell, 'pointwise'), (cell, 'depthwise')]
    if cells(model):
        pruned.append((model.layer1[0].fusion_conv_h, 'weight'))
    for module, name in pruned:
        prune.l1_unstructured(module, name, amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step(model, *data())
        optimizer.step()
    expected = model.eval()(data()[0])
    for module, name in pruned:
        prune.remove(module, name)
        assert (getattr(module, name) == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    torch.testing.assert_close(model(data()[0]), expected)


@nets
def test_ema_follows_every_weight(net):
    model = create(net).train()
    ema = ModelEmaV3(model, decay=0.9)
    before = copy.deepcopy(model.state_dict())
    step(model, *data())
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    ema.update(model)
    for name, after in model.state_dict().items():
        if after.is_floating_point():
            torch.testing.assert_close(ema.module.state_dict()[name], 0.9 * before[name] + 0.1 * after, msg=name)
    assert ema.module(data()[0]).isfinite().all()


@nets
def test_split_batch_norm_gives_the_first_part_what_it_gives_alone(net):
    model, (x, _) = create(net).train(), data(8)
    alone = copy.deepcopy(model)
    split = convert_splitbn_model(model, 2).train()
    torch.testing.assert_close(split(x)[:4], alone(x[:4]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(split.eval()(x), alone.eval()(x), rtol=1e-4, atol=1e-4)


@nets
def test_batch_norms_are_synchronised_and_frozen(net):
    model, (x, _) = create(net), data()
    expected = model(x)
    synchronised = convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(type(m) is torch.nn.BatchNorm2d for m in synchronised.modules())
    torch.testing.assert_close(synchronised(x), expected)
    frozen = freeze_batch_norm_2d(copy.deepcopy(model)).train()
    torch.testing.assert_close(frozen(x), expected)
    free = unfreeze_batch_norm_2d(frozen).train()
    torch.testing.assert_close(free(x), copy.deepcopy(model).train()(x))


@pytest.mark.parametrize('task', [LogitDistillationTask, FeatureDistillationTask], ids=['logits', 'features'])
@nets
def test_distils_as_student_and_as_teacher(net, task):
    for student, teacher in ((net, 'plain'), ('plain', net)):
        student, teacher = create(student).train(), create(teacher)
        weights = copy.deepcopy(teacher.state_dict())
        distillation = task(student, teacher, distill_loss_weight=1.0, task_loss_weight=1.0, verbose=False)
        distillation(*data())['loss'].backward()
        assert [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []
        assert all(torch.equal(weights[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.15), (torch.float16, 0.1)], ids=['bf16', 'fp16'])
@nets
def test_gradients_under_autocast_are_nearly_float64s(net, dtype, tolerance):
    model, (x, y) = create(net), data(size=64)
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


@nets
def test_checkpointing_and_compiling_under_autocast_change_nothing(net):
    model, (x, y) = create(net), data()
    with torch.autocast('cpu', torch.bfloat16):
        loss, expected = step(model, x, y)
        expected = {name: g.clone() for name, g in expected.items()}
        model.set_grad_checkpointing()
        checkpointed_loss, actual = step(model, x, y)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=name)
        assert checkpointed_loss == loss
        model.set_grad_checkpointing(False)
        torch._dynamo.reset()
        compiled_loss, actual = step(torch.compile(model, backend='aot_eager', fullgraph=True), x, y)
        torch.testing.assert_close(compiled_loss, loss, rtol=1e-2, atol=0)
        for name in expected:
            assert_near(actual[f'_orig_mod.{name}'], expected[name], 0.05, name)


@nets
def test_kernels_are_cast_once_a_stage_under_autocast(net):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._to_copy.default
            return function(*args, **(kwargs or {}))

    model = create(net)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), Casts() as casts:
        model(data()[0])
    convolutions = sum(isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) for m in model.modules())
    biases = sum(getattr(m, 'bias', None) is not None for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    # the image, and the classifier's bias; three stacks of kernels a cell
    assert casts.count <= convolutions + biases + 2 + 3 * len(cells(model))


# Sharding


def sharded(model, wrap):
    mesh = init_device_mesh('cpu', (2,))
    modules = {
        'root': [],
        'stages': [m for name, m in model.named_children() if name.startswith('layer')],
        'cells': [*cells(model).values()],
    }[wrap]
    for module in modules:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    results = {}
    for net in NETS:
        for wrap in ('root', 'stages', 'cells'):
            model = sharded(create(net).double(), wrap)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            x, y = data()
            for _ in range(2):
                step(model, x[2 * rank : 2 * rank + 2].double(), y[2 * rank : 2 * rank + 2])
                optimizer.step()
            results[net, wrap] = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(results, f'{folder}/weights.pt')
    dist.destroy_process_group()


def test_sharded_training_is_that_of_one_process(tmp_path):
    mp.spawn(shard_worker, (str(tmp_path),), nprocs=2)
    sharded_weights = torch.load(tmp_path / 'weights.pt')
    for net, wrap in sharded_weights:
        model, (x, y) = create(net).double(), data()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(2):
            step(model, x.double(), y)
            optimizer.step()
        for name, p in model.named_parameters():
            actual = sharded_weights[net, wrap][name]
            torch.testing.assert_close(actual, p.detach(), rtol=1e-6, atol=1e-8, msg=f'{net}, {wrap}: {name}')
    assert len(sharded_weights) == 3 * len(NETS)
