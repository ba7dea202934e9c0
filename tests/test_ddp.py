"""Training in two processes with DistributedDataParallel, as `torchrun train.py` does."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_equations import randomize
from torch.nn.parallel import DistributedDataParallel

import timm_regnet_reg  # noqa: F401  (registers the models)

TINY = dict(layers=(2, 1, 1, 1), channels=(16, 32, 48, 64))
NETS = [
    ('regnet_reg_resnet20_convlstm', dict(layers=(2, 1, 2))),
    ('regnet_reg_resnet50d_convgru', TINY),
    ('regnet_reg_seresnet18_convrnn', dict(TINY, regulated_stages=(1, 4))),
]
STEPS = 2


def build(name, kwargs):
    """In float64, so that sums taken in another order are no longer told apart."""
    return randomize(timm.create_model(name, num_classes=7, **kwargs)).double()


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
    return x, torch.randint(7, (4,), generator=generator)


def train(model, rows=slice(None)):
    """Gradients of each step, and the weights after them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    gradients = []
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        gradients.append({name.removeprefix('module.'): p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return gradients, {name.removeprefix('module.'): p.detach().clone() for name, p in model.named_parameters()}


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    results = []
    for name, kwargs in NETS:
        model = build(name, kwargs)
        rows = slice(2 * rank, 2 * rank + 2)
        frozen = train(DistributedDataParallel(copy.deepcopy(model).eval()), rows)
        model.set_grad_checkpointing(name == 'regnet_reg_resnet50d_convgru')
        results.append((frozen, train(DistributedDataParallel(model.train()), rows)))
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What the two processes have got for each network: with running statistics, and with batch statistics."""
    folder = tmp_path_factory.mktemp('ddp')
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize('i', range(len(NETS)), ids=[name for name, _ in NETS])
def test_two_processes_get_the_gradients_of_one(ranks, i):
    gradients, weights = train(build(*NETS[i]).eval())
    for rank in ranks:
        rank_gradients, rank_weights = rank[i][0]
        for step in range(STEPS):
            assert_same(rank_gradients[step], gradients[step], 1e-9)
        assert_same(rank_weights, weights, 1e-9)


@pytest.mark.parametrize('i', range(len(NETS)), ids=[name for name, _ in NETS])
def test_two_processes_stay_together_in_training_mode(ranks, i):
    (gradients, weights), (other_gradients, other_weights) = (rank[i][1] for rank in ranks)
    for step in range(STEPS):
        assert_same(gradients[step], other_gradients[step], 0)
    assert_same(weights, other_weights, 0)
    regulators = {name: g for name, g in gradients[0].items() if '.regulator.' in name}
    assert regulators and all(g.any() for g in regulators.values())
