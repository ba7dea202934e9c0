"""`bench` on tiny inputs: what it compares and prints; never how long anything takes."""

from itertools import accumulate

import pytest
import timm
import torch
import torch.nn as nn
from networks import CELLS, enliven

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.cells import ConvRNN
from timm_regnet_reg.commands import bench
from timm_regnet_reg.papers import baselines, timing

CPU = torch.device('cpu')
BASELINES = ['naive-convlstm', 'dense-convrnn']


@pytest.fixture
def hasty(monkeypatch):
    """No step is timed more than once a repeat, and nothing is compiled, which takes minutes."""
    monkeypatch.setattr(timing.timeit.Timer, 'autorange', lambda self: (1, 0.0))
    monkeypatch.setattr(torch, 'compile', lambda model, fullgraph: model)


def read_table(text):
    """Row by row its name and what is in the other columns, by their names."""
    header, _, *rows = (
        [cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines() if line[:1] == '|'
    )
    return header[1:], {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}


def test_dense_cell_with_a_separable_kernel_is_the_convrnn():
    torch.manual_seed(0)
    N = 3
    separable, dense = ConvRNN(N, dtype=torch.float64), baselines.DenseConvRNN(N, dtype=torch.float64)
    with torch.no_grad():
        weight = dense.conv.weight.zero_().view(N, 2, N, 3, 3)
        for c in range(N):
            weight[c, :, c] = separable.pointwise[c] * separable.depthwise[c]
        dense.conv.bias.copy_(separable.bias.normal_())
    H = H_expected = None
    for X in torch.randn(3, 2, N, 5, 4, dtype=torch.float64):
        H, _ = dense.step(X, H, None, dense())
        H_expected, _ = separable.step(X, H_expected, None, separable())
        torch.testing.assert_close(H, H_expected, rtol=1e-12, atol=1e-12)


def test_networks_compute_what_their_names_say():
    """The naive one what the regulated one does; the plain one, without batch norms too, what the backbone does."""
    models = baselines.create_networks('resnet20', ['plain', 'convlstm', 'naive-convlstm'])
    plain, regulated, naive = (enliven(model.double()) for model in models.values())
    backbone = timm.create_model('cifar_resnet20').double().eval()
    backbone.load_state_dict(plain.state_dict())
    naive.load_state_dict(regulated.state_dict())
    fused = bench.fuse(plain)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for model, expected in (naive, regulated), (plain, backbone), (fused, backbone):
        torch.testing.assert_close(model(x), expected(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('amp', [False, True])
def test_steps_train_and_infer_in_the_precision_asked_for(amp):
    model, dtype, seen = nn.Linear(2, 10), torch.bfloat16 if amp else torch.float32, []
    model.register_forward_hook(lambda model, x, y: seen.append((y.dtype, model.training, y.requires_grad)))
    model.weight.register_hook(lambda gradient: seen.append(gradient.shape))
    for train in (True, False):
        timing.create_step(model, torch.randn(4, 2), train, amp)()
    assert seen == [(dtype, True, True), (10, 2), (dtype, False, False)]
    assert model.weight.grad is None  # nothing adds up over steps


def test_peak_memory_is_the_most_held_at_a_time():
    MiB = 2**18  # float32 elements

    def step():
        a, b = torch.empty(3 * MiB), torch.empty(5 * MiB)  # 8 MiB are held here
        del a, b
        torch.empty(7 * MiB)

    held = torch.empty(MiB)
    assert timing.peak_memory(step, CPU) == 8 * held.nbytes


def test_kernels_are_told_from_what_launches_them(monkeypatch):
    events = [{'cat': 'cuda_runtime', 'dur': 9.0}, {'name': 'process_name'}]
    monkeypatch.setattr(timing, '_trace', lambda step, activity: events)
    with pytest.raises(RuntimeError, match='saw no kernels'):
        timing.kernel_time(lambda: None)
    events += [{'cat': cat, 'dur': 2.0} for cat in ('kernel', 'kernel', 'gpu_memcpy', 'gpu_memset')]
    assert timing.kernel_time(lambda: None) == pytest.approx(8e-6)


def test_short_steps_are_timed_several_at_once():
    calls = []
    watch = timing.stopwatch(lambda: calls.append(0))
    calls.clear()
    assert watch() > 0 and len(calls) > 100


def test_repeats_are_interleaved_and_compared_with_the_plain_network_of_the_same_repeat(monkeypatch, capsys):
    order, durations = [], [8.0, 2.0, 16.0, 32.0, 12.0, 6.0]  # of two steps each
    times = accumulate(seconds for duration in durations for seconds in (1.0, duration))
    monkeypatch.setattr('torch.utils.benchmark.timer', lambda: next(times))  # before and after
    monkeypatch.setattr(timing.timeit.Timer, 'autorange', lambda self: (2, 0.0))
    table = bench.Bench(['plain', 'convrnn'], 3, CPU, amp=False, gpu=False)
    table._time('train', {name: lambda name=name: order.append(name) for name in table.columns})
    assert order == ['plain', 'convrnn'] + 3 * ['plain', 'plain', 'convrnn', 'convrnn']  # the first to warm up
    table._compare('train', 'peak memory, MiB', {'plain': [2**20], 'convrnn': [3 * 2**20]})
    assert capsys.readouterr().out.splitlines() == [
        '| train, ms | 6000.00 | 3000.00 | ±433% |',  # 16 s are farthest from their median
        '| train, speed ÷ plain | 1.00 | 2.00 | ±100% |',  # 4/1, 8/16, 6/3
        '| train, peak memory, MiB | 1.00 | 3.00 |  |',
        '| train, memory ÷ plain | 1.00 | 3.00 |  |',
    ]


def test_table_has_every_figure_of_every_network(hasty, capsys):
    assert main('bench --backbone resnet20 --batch-size 1 --repeats 2 --compile --device cpu'.split()) == 0
    machine, precision, _, title, *_ = (out := capsys.readouterr().out).splitlines()
    assert machine.startswith('CPU') and torch.__version__ in machine and 'float32' in precision
    assert title == 'resnet20, batch 1, 32x32'
    columns, rows = read_table(out)
    assert columns == ['plain', *CELLS, *BASELINES, 'spread']
    times = ['train', 'inference', 'inference, reparameterised', 'train, compiled', 'inference, compiled']
    peaks = ['train', 'train, checkpointed', 'train, compiled']
    expected = [f'{what}, {kind}' for what in times for kind in ('ms', 'speed ÷ plain')]
    expected += [f'{what}, {kind}' for what in peaks for kind in ('peak memory, MiB', 'memory ÷ plain')]
    assert sorted(rows) == sorted(expected)
    for name, cells in rows.items():
        without = BASELINES if 'reparameterised' in name or 'compiled' in name else []
        assert [column for column in columns[:-1] if not cells[column]] == without
        assert '÷' not in name or cells['plain'] == '1.00'
    kept, checkpointed, compiled = (float(rows[f'{what}, peak memory, MiB']['convlstm']) for what in peaks)
    assert checkpointed < min(kept, compiled)


def test_default_is_what_the_help_says(monkeypatch):
    runs = []
    monkeypatch.setattr(bench.Bench, 'run', lambda self, *args: runs.append((self.networks, self.repeats, *args)))
    for command in ('', '--backbone resnet50', '--backbone resnet32 --compile', '--batch-size 4 --repeats 2'):
        assert main(f'bench --device cpu {command}'.split()) == 0
    plan = [(5, 'resnet20', 128, False), (5, 'resnet50', 16, False), (5, 'resnet50', 16, False)]
    plan += [(5, 'resnet32', 128, True), (2, 'resnet20', 4, False), (2, 'resnet50', 4, False)]
    assert runs == [(['plain', *CELLS, *BASELINES], *run) for run in plan]


def test_on_a_gpu_cells_are_measured_fused_too_with_kernels_and_graphs(hasty, monkeypatch, capsys):
    """With stand-ins for what only a GPU does; a test below has none."""
    fused, compiled = [], []
    monkeypatch.setattr(torch, 'compile', lambda model, fullgraph: compiled.append(model) or model)
    monkeypatch.setattr(bench, 'set_fused', fused.append)
    monkeypatch.setattr(bench, 'kernel_time', lambda step: step() or 0.003)
    monkeypatch.setattr(bench, 'capture', lambda step: step)
    bench.Bench(['plain', 'convrnn', 'convlstm'], 1, CPU, amp=False, gpu=True).run('resnet20', 1, compile=True)
    columns, rows = read_table(capsys.readouterr().out)
    assert columns == ['plain', 'convrnn', 'convlstm', 'convlstm fused', 'spread']
    for what in ('train', 'inference', 'train, compiled', 'inference, compiled'):
        assert set(rows[f'{what}, kernels alone, ms'].values()) == {'3.00', ''}
        for name in (f'{what}, ms', f'{what}, kernels alone, speed ÷ plain', f'{what}, in a graph, speed ÷ plain'):
            assert all(rows[name][column] for column in columns[:-1])
    assert len(compiled) == 2 * 4  # for training and inference, each column
    assert len(fused) % 4 == 0 and fused == [False, False, False, True] * (len(fused) // 4)


def test_network_without_kernels_and_graph_is_not_left_out(hasty, monkeypatch):
    for name in ('kernel_time', 'capture'):
        monkeypatch.setattr(bench, name, lambda step: 1 / 0)
    table, steps = bench.Bench(['plain'], 1, CPU, amp=False, gpu=True), {'plain': lambda: None}
    table._measure('train', steps)
    assert [*steps] == ['plain'] and len(table.failures) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no GPU')
def test_gpu_table_is_complete(hasty, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)  # as it was, afterwards
    monkeypatch.setattr('timm_regnet_reg.fused._enabled', False)
    assert main('bench --backbone resnet20 --batch-size 8 --repeats 1 --amp'.split()) == 0
    columns, rows = read_table(capsys.readouterr().out)
    assert columns == ['plain', *CELLS, 'convgru fused', 'convlstm fused', 'spread']
    assert [name for name in rows if not all(rows[name][column] for column in columns[:-1])] == []


def test_what_fails_for_a_network_is_told_and_the_others_are_measured(hasty, monkeypatch, capsys):
    created = []

    def broken(model, images, train, amp):
        folded = not any(isinstance(module, nn.BatchNorm2d) for module in model.layer1.modules())
        created.append((train, amp, folded))
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (images, model.conv1.weight))
        fails = train and hasattr(model.layer1, 'regulator')
        return timing.create_step(model, images[:, :2] if fails else images, train, amp)

    monkeypatch.setattr(bench, 'create_step', broken)
    command = 'bench --backbone resnet20 --batch-size 1 --repeats 1 --device cpu --networks convrnn --amp'
    assert main(command.split()) == 1
    assert created[::2] == created[1::2] == [(True, True, False), (False, True, False), (False, True, True)]
    out, err = capsys.readouterr()
    columns, rows = read_table(out)
    assert columns == ['plain', 'convrnn', 'spread']
    assert rows['train, ms']['plain'] and not rows['train, ms']['convrnn'] and rows['inference, ms']['convrnn']
    told = 'regnet-reg: error: 1 could not be measured: train, convrnn (RuntimeError: Given groups=1'
    assert 'Traceback' in err and err.splitlines()[-1].startswith(told)
    assert main(['bench', '--device', 'cuda:99']) == 1
    assert capsys.readouterr().err.startswith('regnet-reg: error: --device cuda:99')
