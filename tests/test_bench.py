"""`bench` on tiny inputs: what it compares, counts and writes; never how long anything takes."""

import pytest
import timm
import torch
import torch.nn.functional as F
from reference import cell as reference_cell
from timm_regnet_reg.support import measuring, rivals
from tqdm import tqdm

from timm_regnet_reg.__main__ import main
from timm_regnet_reg.cells import ConvRNN
from timm_regnet_reg.commands import bench

MODELS = ['plain', 'convrnn', 'convgru', 'convlstm', 'naive convlstm', 'dense convrnn']
CPU = torch.device('cpu')


@pytest.fixture
def hasty(monkeypatch):
    """No step is timed more than once a repeat."""
    monkeypatch.setattr(measuring, 'SHORTEST', 0.0)


@pytest.fixture(scope='module')
def models():
    torch.manual_seed(0)
    return {name: model.eval() for name, model in rivals.networks('resnet20').items()}


def randomize(model):
    """Weights and statistics under which every layer matters."""
    for name, value in model.state_dict().items():
        if name.endswith(('bn1.weight', 'bn2.weight', 'running_var')):
            value.uniform_(0.5, 1.5)
        elif name.endswith('running_mean'):
            value.normal_(std=0.1)


def test_naive_cell_is_the_reference():
    torch.manual_seed(0)
    cell = rivals.NaiveConvLSTM(3, dtype=torch.float64)
    params = {key: value.detach() for key, value in cell.state_dict().items()}
    H = C = H_expected = C_expected = None
    for X in torch.randn(3, 2, 3, 5, 4, dtype=torch.float64):
        H, C = cell.step(X, H, C, cell())
        H_expected, C_expected = reference_cell('convlstm', params, X, H_expected, C_expected)
        torch.testing.assert_close(H, H_expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(C, C_expected, rtol=1e-12, atol=1e-12)


def test_dense_cell_with_a_separable_kernel_is_the_convrnn():
    torch.manual_seed(0)
    N = 3
    separable, dense = ConvRNN(N, dtype=torch.float64), rivals.DenseConvRNN(N, dtype=torch.float64)
    with torch.no_grad():
        dense.conv.weight.zero_()
        for c in range(N):
            dense.conv.weight[c, c] = separable.pointwise[c, 0] * separable.depthwise[c, 0]
            dense.conv.weight[c, N + c] = separable.pointwise[c, 1] * separable.depthwise[c, 0]
        dense.conv.bias.copy_(separable.bias.normal_())
    H = H_expected = None
    for X in torch.randn(3, 2, N, 5, 4, dtype=torch.float64):
        H, _ = dense.step(X, H, None, dense())
        H_expected, _ = separable.step(X, H_expected, None, separable())
        torch.testing.assert_close(H, H_expected, rtol=1e-12, atol=1e-12)


def test_naive_network_is_the_regulated_one_with_another_cell(models):
    randomize(models['convlstm'])
    models['naive convlstm'].load_state_dict(models['convlstm'].state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(models['naive convlstm'](x), models['convlstm'](x), rtol=1e-4, atol=1e-5)


def test_plain_network_is_the_backbone(models):
    plain = timm.create_model('cifar_resnet20').eval()
    plain.load_state_dict(models['plain'].state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(models['plain'](x), plain(x))


def test_folded_plain_network_has_no_batch_norm_and_the_same_outputs(models):
    randomize(models['plain'])
    folded = bench.fuse(models['plain'])
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), models['plain'](x), rtol=1e-4, atol=1e-5)


def test_regulators_alone_read_what_they_read_in_the_network():
    model = timm.create_model('regnet_reg_resnet50_convrnn')
    inputs = rivals.regulator_inputs(model, torch.zeros(2, 3, 64, 64))
    # where the 3x3 convolution strides, they read pooled maps
    assert [tuple(X.shape) for X in inputs] == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2)]
    regulators = rivals.Regulators(model)
    assert regulators.steps == [3, 4, 6, 3]
    assert [H.shape for H in regulators(*inputs)] == [X.shape for X in inputs]


def test_peak_memory_is_the_most_held_at_a_time():
    MiB = 2**18  # float32 elements

    def step():
        a = torch.empty(3 * MiB)
        b = torch.empty(5 * MiB)  # 8 MiB are held here
        del a
        c = torch.empty(MiB)
        del b, c
        torch.empty(7 * MiB)

    held = torch.empty(MiB)
    for _ in range(2):
        assert measuring.peak_memory(step, CPU) == 8 * 2**20
    del held


def test_repeats_are_interleaved(hasty):
    order = []

    def contender(name):
        images = torch.zeros(2, 1, 1, 1)
        return measuring.Contender(name, torch.nn.Identity(), lambda model, x: order.append(name), [images])

    contenders = [contender(name) for name in 'abc']
    for c in contenders[1:]:
        c.reference = contenders[0]
    with tqdm(disable=True, total=12) as progress:
        measuring.measure(contenders, 3, progress)
    assert order == [*'aaaabbbbcccc', *'abc' * 3]  # each of two formats warms up and is timed
    for c in contenders:
        assert len(c.seconds) == 3
        assert c.memory_format in measuring.FORMATS
        assert c.images_per_second == [2 / s for s in c.seconds]
        assert c.ratios == pytest.approx([a / s for a, s in zip(contenders[0].seconds, c.seconds)])


def test_short_steps_are_timed_several_at_once(monkeypatch):
    monkeypatch.setattr(measuring, 'SHORTEST', 1.0)
    monkeypatch.setattr(measuring.Contender, 'time', lambda self: 0.3)
    c = measuring.Contender('a', torch.nn.Identity(), lambda model, x: None, [torch.zeros(1, 1, 1, 1)])
    c.warm_up()
    assert c.steps == 4


def test_bench_prints_a_table_of_each_phase(hasty, monkeypatch, capsys):
    monkeypatch.setattr(torch, 'compile', lambda model: model)  # the real one takes minutes
    arguments = ['--backbone', 'resnet20', '--batch-size', '2', '--image-size', '8', '--repeats', '2', '--compile']
    assert main(['bench', *arguments]) == 0
    out, err = capsys.readouterr()
    machine, *tables = out.split('\nresnet20, batch 2, 8x8: ')
    assert torch.__version__ in machine
    folded, compiled = ([f'{name}, {kind}' for name in MODELS[:4]] for kind in ('folded', 'compiled'))
    expected = {
        'train': [*MODELS, *compiled],
        'inference': [*MODELS, *folded, *compiled],
        'regulators': ['dense convrnn', 'naive convlstm', 'convrnn', 'convgru', 'convlstm'],
    }
    assert [table.splitlines()[0] for table in tables] == list(expected)
    for table, (phase, names) in zip(tables, expected.items()):
        assert f'resnet20 {phase}' in err  # the progress bar
        header, _, *rows = (
            [cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines() if line.startswith('|')
        )
        assert header[5] == f'÷ {names[0]}'
        assert [row[0] for row in rows] == names
        references = {row[0] for row in rows if row[5] == '1.00 (1.00–1.00)'}
        assert references >= {name for name in names if name.partition(',')[0] == names[0]}
        if phase == 'train':
            assert {row[0] for row in rows if float(row[6] or 0) > 0} == set(MODELS)  # peak memory
        if phase != 'regulators':
            assert rows[0][1:3] == ['0.272', '0.0026']  # a 16th of the figure at 32x32


def test_checkpointing_is_measured_and_switched_off_again(models):
    step = measuring.Contender('a', models['convlstm'].train(), measuring.train, [torch.randn(32, 3, 32, 32)])
    measuring.measure_peaks(step, CPU)
    models['convlstm'].eval()
    assert step.checkpointed_peak < step.peak
    assert not any(getattr(m, 'grad_checkpointing', False) for m in models['convlstm'].modules())


@pytest.mark.parametrize('exponent', [0.5, 1.0, 2.0])
def test_scaling_exponent_is_that_of_a_power(exponent):
    sizes = [1, 2, 5, 30]
    assert bench.scaling_exponent(sizes, [3 * size**exponent for size in sizes]) == pytest.approx(exponent)


def test_scaling_varies_batch_pixels_and_blocks(hasty, monkeypatch, capsys):
    def step(model, x):  # instead of a network's
        F.avg_pool2d(x, 2)

    monkeypatch.setattr(bench, 'train', step)
    monkeypatch.setattr(bench, 'infer', step)
    assert main(['bench', '--scaling', '--batch-size', '16', '--repeats', '1']) == 0
    rows = [line.strip('|').split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('| ')]
    found = {
        (phase.strip(), what.strip()): [int(time.partition(':')[0]) for time in times.split(',')]
        for phase, what, times, _ in rows[2:]
    }
    sizes = {
        'batch': [2, 4, 8, 16],
        'pixels': [32**2, 48**2, 64**2, 96**2],
        'blocks': [9, 15, 21, 27, 54],
    }
    assert found == {(phase, what): sizes[what] for phase in ('train', 'inference') for what in sizes}


@pytest.mark.parametrize(
    'arguments, message',
    [
        ('--backbone resnet21', "unknown backbone 'resnet21': choose one of resnet20, resnet32"),
        ('--image-size 1', '--image-size 1 is too small for resnet20: give at least 8'),
        ('--image-size 32', '--image-size 32 is too small for resnet50: give at least 64'),
        ('--scaling --image-size 7', '--image-size 7 is too small for resnet20'),
        ('--scaling --batch-size 1 --image-size 8', '--batch-size 1 is too small for --scaling'),
        ('--scaling --compile', '--scaling times eager networks alone'),
        ('--backbone resnet20 --batch-size 999999999', 'out of memory ('),
        ('--device gpu', '--device gpu'),
        ('--device cuda:99', '--device cuda:99'),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'measure', None)  # nothing is measured in vain
    assert main(['bench', *arguments.split()]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f'regnet-reg: error: {message}') and err.count('\n') == 1


@pytest.mark.parametrize(
    'arguments',
    ['--repeats 0', '--batch-size -1', '--batch-size 1000000000', '--threads 1000000', '--scaling --backbone resnet20'],
)
def test_senseless_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(['bench', *arguments.split()])
    assert exit.value.code == 2
