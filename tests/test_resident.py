"""The engine of `reproduce`, held against plain SGD, timm's functions, and timm's train.py (see test_recipes.py)."""

import functools
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import full_disk
from PIL import Image
from test_recipes import RECIPES, load, load_script, train_script  # noqa: F401, a fixture
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_regnet_reg.cells import ConvLSTM
from timm_regnet_reg.errors import UserError
from timm_regnet_reg.papers import resident
from timm_regnet_reg.papers.resident import Images, Network
from timm_regnet_reg.papers.results import ROWS, Row, Run

PLAIN, LSTM, SPARED = ROWS[0], ROWS[3], Row(ROWS[3].model, 'cell_weight_decay=False')
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])


def create_images(train=44, test=20):
    random = np.random.default_rng(0)
    arrays = []
    for number, size in (train, 40), (test, 32):
        arrays += [random.integers(0, 256, (number, size, size, 3), np.uint8), np.arange(number) % 10]
    return Images(*map(torch.from_numpy, arrays))


def create_run(row=PLAIN, seed=3, dataset='cifar10', schedule='', **recipe):
    recipe = {**load(dataset + schedule), 'batch_size': 16, 'epochs': 3, 'decay_milestones': [1, 2], **recipe}
    return Run(row, dataset, 'papers', seed, 'resident', recipe, {'train': 44, 'validation': 20})


def create_network(run, folder, images=create_images(), compiled=False):
    return Network(run, images, folder, compiled)


def assert_equal(run, *folders):
    """Weights, momenta and losses that were saved there."""
    ours, theirs = (create_network(run, folder)._state() for folder in folders)
    for key in ('state_dict', 'momenta', 'losses'):
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


def batch(network, update):
    """What an update sees, put together as its description says: normalised windows (B, 3, 32, 32), and classes."""
    update %= network.updates_per_epoch
    views = []
    for index, top, left, flip in zip(*(x[update] for x in (network.order, network.top, network.left, network.flip))):
        window = network.images.train[index, top : top + 32, left : left + 32]
        views.append((window.flip(1) if flip else window) / 255)
    x = (torch.stack(views) - MEAN) / STD
    return x.permute(0, 3, 1, 2), network.images.train_labels[network.order[update]]


@pytest.mark.parametrize('row', [PLAIN, LSTM], ids=str)
@pytest.mark.parametrize('schedule', ['', '_short'])
def test_an_epoch_gives_the_weights_and_rates_of_train_py(schedule, row, train_script, tmp_path):  # noqa: F811
    """timm's own loop on the same batches: two in the first epoch, two in the second, with another learning rate."""
    train_py, run = load_script(train_script), create_run(row, schedule=schedule)
    network = create_network(run, tmp_path)
    args = train_py.parser.parse_args([])
    vars(args).update(run.recipe, lr=0.1 * 16 / 128, prefetcher=True, distributed=False, rank=0)
    timm.utils.random_seed(3)
    model = timm.create_model(row.model).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, **timm.optim.optimizer_kwargs(args), **args.opt_kwargs)
    options = timm.scheduler.scheduler_kwargs(args)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, **options, updates_per_epoch=2)
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), verbose=False)
    rates = []
    optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]['lr']))
    for epoch in range(2):
        network.step()
        batches = [batch(network, update) for update in range(2)]
        network.step()
        figures = train_py.train_one_epoch(
            epoch, model, batches, optimizer, args, task=task, device=torch.device('cpu'), lr_scheduler=scheduler
        )
        assert network.loss() == pytest.approx(figures['loss'], rel=1e-5)
    assert network.rates[:4].tolist() == pytest.approx(rates)
    torch.testing.assert_close(network.model.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('row', [PLAIN, LSTM, SPARED], ids=str)
@pytest.mark.parametrize('nesterov, decay', [(False, 1e-4), (True, 5e-4)])
def test_three_updates_give_the_weights_of_plain_sgd(nesterov, decay, row, tmp_path):
    run = create_run(row, opt='sgd' if nesterov else 'momentum', weight_decay=decay, decay_milestones=[2])
    network = create_network(run, tmp_path, create_images(48))
    torch.manual_seed(3)
    model = timm.create_model(row.model).train()
    spared = {p for m in model.modules() if isinstance(m, ConvLSTM) and row == SPARED for p in m.parameters()}
    velocity = {}
    for update in range(3):
        network.step()
        x, y = batch(network, update)
        loss = torch.nn.functional.cross_entropy(model(x), y)
        for p, gradient in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters()))):
            with torch.no_grad():
                gradient = gradient if p in spared else gradient + decay * p
                velocity[p] = 0.9 * velocity[p] + gradient if p in velocity else gradient
                p -= 0.1 * 16 / 128 * (gradient + 0.9 * velocity[p] if nesterov else velocity[p])
    torch.testing.assert_close(network.model.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-5)


def test_an_epoch_sees_every_image_at_most_once_and_all_windows_are_drawn(tmp_path):
    network = create_network(create_run(batch_size=100), tmp_path, create_images(2050))
    network.draw_views()
    assert len(network.order.unique()) == 2000
    drawn = set(zip(network.top.flatten().tolist(), network.left.flatten().tolist()))
    assert len(drawn) == 81 and 0.4 < network.flip.float().mean() < 0.6
    first = network.order.clone()
    network.done = network.updates_per_epoch
    network.draw_views()
    assert not network.order.equal(first)
    other = create_network(create_run(batch_size=100, seed=4, hflip=0.0), tmp_path, create_images(2050))
    other.draw_views()
    assert not other.order.equal(network.order), 'the next seed draws what this one draws an epoch later'
    assert not other.flip.any()


@pytest.mark.parametrize('dataset, digest', [('cifar10', '2ca72b2b'), ('cifar100', '2b1e5de1')])
def test_accuracy_is_that_of_timms_loader_on_the_same_folder_which_is_known_again(dataset, digest, tmp_path):
    write_folder(tmp_path, test=2, classes=int(dataset.removeprefix('cifar')))
    assert resident.find_splits(str(tmp_path), dataset)[1]['digest'] == digest  # which results are known by
    network = create_network(create_run(dataset=dataset), tmp_path, read_images(tmp_path, dataset))
    torch.nn.init.normal_(network.model.fc.weight)
    config = timm.data.resolve_data_config(network.recipe, model=network.model)
    for key in ('mean', 'std'):
        assert (getattr(network, key) / 255).tolist() == pytest.approx(config[key])
    data = create_dataset('', root=str(tmp_path), split='validation')
    options = dict(batch_size=7, num_workers=0, use_prefetcher=True, device=torch.device('cpu'))
    network.model.eval()
    batches = create_loader(data, **config, **options)
    hits = torch.cat([network.model(x).topk(5).indices == y[:, None] for x, y in batches]).float()
    result = network.result()
    assert result['top1'] == pytest.approx(100 * hits[:, 0].mean().item(), abs=1e-3)
    assert result['top5'] == pytest.approx(100 * hits.sum(1).mean().item(), abs=1e-3)


def write_folder(path, train=2, test=1, classes=10):
    random, turned = np.random.default_rng(0), Image.Exif()
    turned[0x0112] = 6  # which timm's data sets don't look at
    for split, size, number in ('train', 40, train), ('validation', 32, test):
        for label in range(classes):
            folder = path / split / f'class{label}'
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 256, (size, size, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f'{index}.png', exif=turned)


def read_images(path, dataset='cifar10'):
    return resident.read_images(resident.find_splits(str(path), dataset)[0], torch.device('cpu'))


def train(runs, attempt=nullcontext, version='2', stop=math.inf):
    """What the engine measured, by runs."""
    return dict(resident.train(runs, create_images(), {'torch': version}, attempt, stop, compiled=False))


def test_a_run_that_was_stopped_and_killed_ends_as_one_that_was_not_and_gives_its_row_again(tmp_path, monkeypatch):
    """An update takes 20 seconds here, and every 30 seconds the run is saved."""
    run, folder, step, save, now, saved = create_run(LSTM), tmp_path / 'parts', Network.step, Network.save, [0.0], []
    whole = train({run: tmp_path / 'whole'})[run]

    def slow(network):
        if saved == [2, 3] and network.done == 4:
            raise KeyboardInterrupt
        now[0] += 20
        step(network)

    monkeypatch.setattr(resident, 'time', SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Network, 'step', slow)
    monkeypatch.setattr(Network, 'save', lambda network, _: saved.append(network.done) or save(network, _))
    assert train({run: folder}, version='1', stop=60) == {}
    with pytest.raises(KeyboardInterrupt):
        train({run: folder})
    saved.append('killed')
    now[0] += 1000
    results = train({run: folder})
    assert results[run] == {**whole, 'seconds': 120, 'torch': '1 and 2'}
    assert_equal(run, folder, tmp_path / 'whole')
    end = [*now]
    assert train({run: folder}) == results and now == end
    assert saved == [2, 3, 'killed', 5, 6, 6]


def test_networks_at_once_end_as_alone_whatever_happens_to_others(tmp_path, monkeypatch):
    runs = create_run(LSTM), create_run(seed=4), create_run(lr_base=1e30), create_run(seed=5), create_run(seed=6)
    folders = {run: tmp_path / str(index) for index, run in enumerate(runs)}
    (tmp_path / '3').write_text('a file where a folder should be')
    result, failures = Network.result, {}

    def no_memory(network):
        if network.run is runs[4]:
            raise torch.OutOfMemoryError('no memory')
        return result(network)

    @contextmanager
    def attempt(run):
        try:
            yield
        except (UserError, torch.OutOfMemoryError) as error:
            failures[run] = str(error)

    monkeypatch.setattr(Network, 'result', no_memory)
    results = train(folders, attempt)
    for run, message in zip(runs[2:], ('diverged', 'cannot be written', 'no memory')):
        assert message in failures[run] and run not in results
    for run in runs[:2]:
        alone = train({run: tmp_path / 'alone' / str(run.seed)})[run]
        assert {**alone, 'seconds': 0} == {**results[run], 'seconds': 0}
        assert_equal(run, folders[run], tmp_path / 'alone' / str(run.seed))


def test_a_checkpoint_outlives_a_full_disk_and_is_told_and_kept_if_it_is_damaged(tmp_path):
    run = create_run()
    network = create_network(run, tmp_path)
    network.save({})
    content = network.path.read_bytes()
    with full_disk(1000), pytest.raises(UserError, match='could not be written'):
        train({run: tmp_path}, stop=0)
    assert network.path.read_bytes() == content
    network.path.write_bytes(content[:5000])
    with pytest.raises(UserError, match='cannot be gone on with'):
        create_network(run, tmp_path)
    assert network.path.read_bytes() == content[:5000]


@pytest.mark.parametrize('amp', [False, True])
def test_a_compilation_serves_all_seeds(amp, tmp_path, monkeypatch):
    """Traced by torch.compile, without a compiler behind it: that takes minutes."""
    graphs, dtypes = [], []
    backend = functools.partial(torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph)
    monkeypatch.setattr(torch, 'compile', backend)
    for seed in (0, 1):
        run = create_run(seed=seed, amp=amp, amp_dtype='bfloat16')
        compiled, plain = (create_network(run, tmp_path, compiled=compiled) for compiled in (True, False))
        plain.model.fc.register_forward_hook(lambda fc, x, y: dtypes.append(y.dtype))
        for network in (compiled, plain):
            network.step()
        plain.result()
        assert compiled.loss() == pytest.approx(plain.loss(), rel=1e-2 if amp else 1e-5)
    assert len(graphs) == 1 and dtypes == 4 * [torch.bfloat16 if amp else torch.float32]


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(mixup=0.2), 'mixup: 0.2'),
        (dict(opt='lamb', sched='step', scale=[0.08, 1.0]), r'opt: lamb, sched: step, scale: \[0.08, 1.0\];'),
        (dict(channels_last=False, ratio=[0.75, 1.3], color_jitter=0.4), r'_last: False, ratio: \[.*, color_jitter: 0'),
        (dict(smoothing=0.1), 'smoothing: 0.1'),
        (dict(smoothing=None), 'no smoothing'),
        (dict(decay_milestones=None), 'no decay_milestones'),
        (dict(amp=True, amp_dtype='float16'), 'amp_dtype: float16'),
        (dict(amp=True), 'no amp_dtype'),  # float16 for train.py
        (dict(opt_kwargs={'filter_bias_and_bn': False, 'layer_decay': 0.5}), 'opt_kwargs: layer_decay'),
    ],
)
def test_a_recipe_that_the_engine_does_not_follow_is_refused_by_name(change, message):
    recipe = {key: value for key, value in {**load('cifar10'), **change}.items() if value is not None}
    with pytest.raises(UserError, match=message):
        resident.check_recipe(recipe)


def test_the_engine_follows_every_recipe_for_cifar():
    for name in ('cifar10', 'cifar10_short', 'cifar10_strong', 'cifar100'):
        resident.check_recipe(load(name))


def test_images_are_those_of_the_folder_in_the_order_of_its_classes(tmp_path):
    write_folder(tmp_path)
    images = read_images(tmp_path)
    assert images.train.shape == (20, 40, 40, 3) and images.test_labels.tolist() == [*range(10)]
    assert np.array_equal(images.train[3], Image.open(tmp_path / 'train' / 'class1' / '1.png'))
    last, known = tmp_path / 'train' / 'class8' / '1.png', []
    for change in (
        lambda: None,
        lambda: Image.new('RGB', (40, 40)).save(last),
        lambda: last.rename(tmp_path / 'train' / 'class7' / '9.png'),
        lambda: (tmp_path / 'train' / 'class9').rename(tmp_path / 'train' / 'cow'),
    ):
        change()
        known.append(resident.find_splits(str(tmp_path), 'cifar10')[1])
    assert len({told.pop('digest') for told in known}) == 4 and known == 4 * [{'train': 20, 'validation': 10}]
    Image.new('RGB', (32, 32)).save(last)
    with pytest.raises(UserError, match='1.png: is 32x32, expected 40x40'):
        read_images(tmp_path)
    last.write_bytes(b'')
    with pytest.raises(UserError, match='1.png: cannot be read'):
        read_images(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device for the graphs')
def test_a_gpu_goes_on_with_what_a_cpu_began_and_gives_its_weights(tmp_path):
    run = create_run(LSTM)
    cpu = create_network(run, tmp_path)
    cpu.step()
    cpu.save({'device': 'cpu'})
    gpu = create_network(run, tmp_path, Images(*(tensor.cuda() for tensor in create_images())))
    for _ in range(2):
        cpu.step()
        gpu.step()
    torch.cuda.synchronize()
    tolerances = dict(rtol=1e-3, atol=1e-3, check_device=False)
    torch.testing.assert_close(gpu.model.state_dict(), cpu.model.state_dict(), **tolerances)
