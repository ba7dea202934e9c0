"""`reproduce`: its runs, what it hands to train.py, and the tables that it makes of the results.

The test that trains by train.py needs timm's; see test_recipes.py. The engine's own tests are in test_resident.py.
"""

import argparse
import csv
import importlib.util
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest import full_disk
from matplotlib.axes import Axes
from PIL import Image
from test_recipes import ROOT, load, parsers, train_script  # noqa: F401, two fixtures
from test_resident import SPARED, write_folder

import timm_regnet_reg
from timm_regnet_reg.__main__ import main
from timm_regnet_reg.commands import reproduce
from timm_regnet_reg.errors import UserError
from timm_regnet_reg.papers import results as papers_results
from timm_regnet_reg.papers.resident import Network
from timm_regnet_reg.papers.results import COLUMNS, ROWS, TABLES, Row, Run, add_result, read_results, report
from timm_regnet_reg.weights.files import locked

RECIPE = load('cifar10')
SHORT = {**RECIPE, 'epochs': 2, 'batch_size': 16}
PUBLISHED = ROOT / 'train_recipes' / 'results' / 'cifar10.csv'


def create_run(row=ROWS[0], dataset='cifar10', schedule='papers', seed=0, engine='resident', recipe=RECIPE, **images):
    images = {'train': 50000, 'validation': 5000, 'digest': '917b1db6', **images}  # CIFAR-10's
    return Run(row, dataset, schedule, seed, engine, recipe, images)


def create_result(row, seed, top1, **more):
    result = {**dict.fromkeys(COLUMNS, '1'), **create_run(row, seed=seed).identity}
    return {**result, 'top1': top1, 'parameters': 272474, 'multiply_adds': 40813184, **more}


def test_a_run_is_known_by_all_that_decides_its_result():
    run = create_run()
    same = create_run(recipe=yaml.safe_load(yaml.safe_dump(RECIPE)))  # without the comments
    assert run.has_result([same.identity]) and run.name == same.name
    layers = (Row(ROWS[0].model, f'layers={layers}') for layers in ('(1,12,2)', '(11,2,2)'))
    others = [create_run(row) for row in (ROWS[1], *TABLES['stages'][4:6], SPARED, *layers)]
    changes = dict(dataset='cifar100'), dict(schedule='short'), dict(seed=1), dict(engine='train.py'), dict(train=45000)
    others += [create_run(**change) for change in (*changes, dict(validation=10000), dict(digest='0'))]
    others += [create_run(recipe={**RECIPE, **change}) for change in (dict(amp=True), dict(momentum=0.8))]
    assert len({other.name for other in (run, *others)}) == 1 + len(others)
    assert not run.has_result([other.identity for other in others])
    amp, bf16 = dict(amp=True), 'bfloat16'
    for change, precision in (
        ({}, 'float32'),
        ({**amp, 'amp_dtype': bf16}, 'bf16'),
        (amp, 'float16'),
        (dict(model_dtype=bf16), 'bf16'),
        ({**amp, 'amp_dtype': bf16, 'model_dtype': 'float32'}, 'bf16'),
    ):
        run = create_run(recipe={**RECIPE, **change})
        assert run.identity['precision'] == precision
        if change == amp:
            assert '--amp --amp-dtype float16' in ' '.join(reproduce._options(run, Path('recipe')))


def test_published_results_are_readmes_and_of_the_recipes(parsers):  # noqa: F811
    """Such runs in bf16 have rows already; the options of train.py's, as it reads them, are cifar10_short.yaml's."""
    known = read_results(PUBLISHED)
    text = PUBLISHED.with_name('README.md').read_text()
    tables = [part.split('<!-- end of')[0] for part in text.split('<!-- regnet-reg reproduce --report -->\n')[1:]]
    assert [len(table.splitlines()) for table in tables] == [4, 6] and all(table in report(known) for table in tables)
    amp, short = {'amp': True, 'amp_dtype': 'bfloat16'}, load('cifar10_short')
    of_script = dict(schedule='short', engine='train.py', recipe={**short, **amp})
    runs = [create_run(row, seed=seed, **of_script) for row in ROWS[:4] for seed in range(3)]
    rows = ROWS[0], next(row for row in ROWS if str(row) == f'{ROWS[3]} regulated_stages=(3,)')
    runs += [create_run(row, seed=seed, recipe={**RECIPE, **amp}) for row in rows for seed in range(4)]
    assert len(runs) == len(known) and all(run.has_result(known) for run in runs)
    options = next(result['options'] for result in known if result['schedule'] == 'short')
    given = parsers['train.py'].parse_args(options.split(), argparse.Namespace(**RECIPE))
    assert {key: getattr(given, key) for key in short} == short and given.amp and given.amp_dtype == 'bfloat16'


@pytest.mark.parametrize('freedom, quantile', [(1, 12.7062), (4, 2.7764), (8, 2.3060), (30, 2.0423), (300, 1.9679)])
def test_intervals_are_students(freedom, quantile):
    """The tables of Student's t, 97.5 %."""
    assert papers_results._student(freedom) == pytest.approx(quantile, abs=2e-4)


def test_report_has_means_and_intervals_in_the_order_of_the_tables_and_never_mixes_runs(tmp_path, capsys):
    """91, 92 and 93 % are errors of 8 ± 1 %; the papers' are SPEC's. The interval is 4.3027 * sqrt(1 / 3 + 1)."""
    path = tmp_path / 'results' / 'cifar10.csv'
    add_result(path, create_result(TABLES['stages'][0], 0, 95))
    add_result(path, create_result(SPARED, 1, 94))
    add_result(path, create_result(ROWS[3], 0, 92.5))
    for seed, top1 in (10, 93), (0, 91), (2, 92):
        add_result(path, create_result(ROWS[0], seed, top1, torch='2.1' if seed else '2.2'))
    add_result(path, create_result(Row('resnet18', ''), 0, 90, engine='train.py'))
    add_result(path, create_result(ROWS[0], 3, 70, settings='2'))
    assert [result['seed'] for result in read_results(path)] == ['3', '0', '2', '10', '0', '0', '1', '0']
    with pytest.raises(ValueError, match='two rows'):
        add_result(path, create_result(ROWS[3], 0, 94))
    command = ['reproduce', '--report', '--results', str(path.parent)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line.startswith(('| cifar', '| re', '- '))] == [
        '| cifar_resnet20 | 0.272M | 40.8M | 30.00 | 1 | 1.000 | 8.38 |',
        '| cifar_resnet20 | 0.272M | 40.8M | 8.00 ± 1.00 | 3 | 1.000 | 8.38 |',
        '| regnet_reg_resnet20_convlstm | 0.272M | 40.8M | 7.50 | 1 | 1.000 | 7.28 |',
        '| regnet_reg_resnet20_convgru regulated_stages=(1,) | 0.272M | 40.8M | 5.00 | 1 | 1.000 | 7.52 |',
        '| regnet_reg_resnet20_convlstm cell_weight_decay=False | 0.272M | 40.8M | 6.00 | 1 | 1.000 |  |',
        '- regnet_reg_resnet20_convlstm: -0.50 ± 4.97',
        '- regnet_reg_resnet20_convgru regulated_stages=(1,): -3.00 ± 4.97',
        '- regnet_reg_resnet20_convlstm cell_weight_decay=False: -2.00 ± 4.97',
        '| resnet18 | 0.272M | 40.8M | 10.00 | 1 | 1.000 |  |',
    ]
    assert 'torch 1 and 2.1 and 2.2, python 1:' in text
    picture = path.with_suffix('.png').read_bytes()
    assert main(command) == 0 and path.with_suffix('.png').read_bytes() == picture
    with full_disk(4):
        assert main(command) == 1
    assert 'could not be written' in capsys.readouterr().err and path.with_suffix('.png').read_bytes() == picture
    assert Image.open(path.with_suffix('.png')).size == (1800, 450)


def test_tables_and_figures_of_cifar100_are_beside_its_papers(tmp_path, capsys, monkeypatch):
    path, drawn = tmp_path / 'cifar100.csv', []
    for row, seed, top1 in (
        (ROWS[0], 0, 69),
        (ROWS[0], 1, 71),
        (ROWS[2], 0, 75),
        (ROWS[1], 0, 72),
        (TABLES['stages'][0], 0, 72),
    ):
        add_result(path, create_result(row, seed, top1, dataset='cifar100'))
    monkeypatch.setattr(Axes, 'legend', lambda axes, **_: drawn.append(axes))
    assert main(['reproduce', '--report', '--dataset', 'cifar100', '--results', str(tmp_path)]) == 0
    assert '| 30.00 ± 1.41 | 2 | 1.000 | 31.72 |' in capsys.readouterr().out
    [axes] = drawn
    assert sorted(axes.get_legend_handles_labels()[1]) == ['convgru', 'convrnn', 'plain']
    assert 31.72 in [line.get_ydata()[0] for line in axes.lines if line.get_fillstyle() == 'none']
    [segment] = axes.containers[0].lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([30 - 2**0.5, 30 + 2**0.5])


def test_a_row_waits_for_others_to_be_written(tmp_path):
    path = tmp_path / 'cifar10.csv'
    with ThreadPoolExecutor() as pool:
        with locked(path, seconds=0):
            added = pool.submit(add_result, path, create_result(ROWS[0], 0, 90))
            assert not wait([added], timeout=0.1).done
        added.result()
    assert len(read_results(path)) == 1


def test_models_are_chosen_by_name_alone_or_with_their_arguments():
    rows = [row for row in TABLES['stages'] if row.model == ROWS[2].model]
    assert reproduce._choose(['stages'], [ROWS[2].model]) == rows and len(rows) > 1
    assert reproduce._choose(['stages'], [str(rows[1])]) == [rows[1]]


@pytest.mark.parametrize(
    'found, instead, message',
    [
        ('90.5', 'nan', 'cannot be'),
        ('90.5', '-5', 'cannot be'),
        ('0.25', 'inf', 'cannot be'),
        ('5000', '', 'invalid literal'),
        ('cifar10', 'cifar11', 'no data set'),
        ('model', 'name', 'has not the columns'),
        ('model', '\udcff', 'cannot be read'),
        pytest.param('cifar10', '1' * 200_000, 'cannot be read as results (field larger', id='long'),
        (r'\n(.+)', r'\n\1\n\1', 'two rows'),
        (r'\n(.+)', r'', 'no results'),
    ],
)
def test_damaged_results_make_no_table(found, instead, message, tmp_path, capsys):
    path = tmp_path / 'cifar10.csv'
    add_result(path, create_result(ROWS[0], 0, 90.5, train_loss=0.25))
    path.write_text(re.sub(found, instead, path.read_text(), count=1), errors='surrogateescape')
    assert main(['reproduce', '--report', '--results', str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


# instead of train.py: the plain network fails, the ConvRNN diverges
SCRIPT = """
import importlib.util, json, pathlib, sys
given = dict(zip(sys.argv, sys.argv[1:]))
pathlib.Path(sys.argv[0]).with_name('train_recipes').joinpath('cifar10.yaml').write_text('')  # edited meanwhile
if given['--model'] == 'cifar_resnet20':
    sys.exit('out of disk')
folder = pathlib.Path(given['--output'], given['--experiment'])
(folder / 'given').write_text(json.dumps([sys.argv[1:], importlib.util.find_spec('timm_regnet_reg').origin]))
loss = 'nan' if 'convrnn' in given['--model'] else 0.5
with open(folder / 'summary.csv', 'a') as file:
    file.write(f'epoch,train_loss,eval_top1,eval_top5\\n1,{loss},90,99\\n')
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone of this project with a recipe of two epochs, a script in place of train.py, and 20 images."""
    (tmp_path / 'train_recipes').mkdir()
    (tmp_path / 'train_recipes' / 'cifar10.yaml').write_text(yaml.safe_dump(SHORT).replace('0.0001', '1e-4'))
    (tmp_path / 'train.py').write_text(SCRIPT)
    write_folder(tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_trained_once_by_one_process_goes_on_and_can_be_packaged(clone, capsys, monkeypatch):
    command = ['reproduce', '--data-dir', 'data', '--results', 'results']
    rows = ['cifar_resnet20', f'{ROWS[3]} regulated_stages=(3,)', 'resnet10t drop_rate=.1 stem_width=8']
    command += ['--schedule', 'own', '--models', *rows, '--seeds', '0', '0']
    Path('train_recipes/cifar10.yaml').rename('train_recipes/cifar10_own.yaml')
    images, step = reproduce.resident.find_splits('data', 'cifar10')[1], Network.step
    taken = create_run(schedule='own', recipe=SHORT, **images)

    def killed(network):
        if network.done == 1:
            raise KeyboardInterrupt
        step(network)

    with locked(Path('runs', taken.name), seconds=0):
        with monkeypatch.context() as patch:
            patch.setattr(reproduce.resident, 'SAVE_SECONDS', 0)
            patch.setattr(Network, 'step', killed)
            assert main(command) == 130
        assert main(command) == 0
    out = capsys.readouterr().out
    assert f'{rows[0]}, seed 0: another process has it' in out and f'{rows[1]}, seed 0: goes on after update 1' in out
    assert main(command) == 0
    assert '2 of 3 runs were done before' in capsys.readouterr().out
    known = read_results(Path('results', 'cifar10.csv'))
    assert [f'{result["model"]} {result["arguments"]}'.strip() for result in known] == rows
    assert known[2]['parameters'] == '4876696' and '| resnet10t drop' in report(known)
    assert known[0]['parameters'] == '272474' and known[0]['images'] == '10' and known[0]['torch'] == torch.__version__
    assert known[1]['options'].startswith(f'--config train_recipes/cifar10_own.yaml --model {ROWS[3]}')
    assert main(command) == 0 and '3 of 3 runs were done before' in capsys.readouterr().out

    for model, name in zip((row.split()[0] for row in rows[1:]), ('*-stage3-*', '*-drop_rate.1stem_width8-*')):
        checkpoint = next(Path('runs').glob(f'{name}/last.pth.tar'))
        command = ['package', str(checkpoint), '--model', model, '--tag', 'tiny', '--workers', '0']
        command += ['--data-dir', 'data', '--data-name', 'noise', '--recipe', 'train_recipes/cifar10_own.yaml']
        assert main(command) == 0
        card = Path(f'{model}.tiny', 'README.md').read_text()
        assert '2 of 2' in card and 'one of `regnet-reg reproduce`' in card and '| (3, 32, 32), bi' in card
        assert '| Recipe | cifar10_own.yaml |' in card and ' crop of 1.0 |' in card
        assert ('drop: 0.1' in card) == (model == 'resnet10t')


def test_networks_are_counted_on_cifars_images_without_their_weights(hub):
    parameters = sum(parameter.numel() for parameter in timm.create_model('resnet10t', num_classes=10).parameters())
    counts = reproduce._count(Row('resnet10t', 'pretrained=True'), 'cifar10')
    assert counts['parameters'] == parameters and counts['multiply_adds'] < 1e8  # on 32x32, whatever it was made for
    assert hub.requests == []


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('no memory'), OSError(28, 'No space left'), UserError('nan')])
def test_what_fails_for_one_run_is_told_and_others_go_on(error, clone, capsys, monkeypatch):
    result = Network.result

    def failing(network):
        if network.run.row == ROWS[0]:
            raise error
        return result(network)

    monkeypatch.setattr(Network, 'result', failing)
    models = [ROWS[0].model, ROWS[1].model]
    assert main(['reproduce', '--data-dir', 'data', '--results', 'results', '--models', *models]) == 1
    assert '1 of 2 runs are not done' in capsys.readouterr().err
    assert [result['model'] for result in read_results(Path('results', 'cifar10.csv'))] == models[1:]
    seen = [[]]  # before another process adds the row
    monkeypatch.setattr(reproduce, 'read_results', lambda path: seen.pop() if seen else read_results(path))
    monkeypatch.setattr(Network, 'step', lambda network: pytest.fail('it is trained again'))
    assert main(['reproduce', '--data-dir', 'data', '--results', 'results', '--models', models[1]]) == 0


@pytest.mark.parametrize('device, fast, groups', [('cpu', False, 12 * [1]), *(('cuda:1', x, [8, 4]) for x in (0, 1))])
def test_a_gpu_alone_trains_eight_networks_at_once_compiled_and_fused(device, fast, groups, clone, monkeypatch):
    """With stand-ins for what only a GPU does; an old one computes eagerly."""
    fused, trained, chosen = [], [], []
    monkeypatch.setattr(reproduce, 'check_device', torch.device)
    monkeypatch.setattr(reproduce, 'time', SimpleNamespace(monotonic=lambda: 5.0))
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0) if fast else (7, 5))
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'triton')
    monkeypatch.setattr(reproduce, 'set_fused', fused.append)
    monkeypatch.setattr(reproduce.resident, 'read_images', lambda found, device: device)

    def train(runs, images, versions, attempt, stop, compiled):
        trained.append((len(runs), images, stop, compiled))
        assert {run.identity['precision'] for run in runs} == {'bf16'} and all(run.recipe['amp'] for run in runs)
        return []

    monkeypatch.setattr(reproduce.resident, 'train', train)
    command = 'reproduce --data-dir data --results results --seeds 0 1 2 --amp --minutes 2 --device'
    assert main([*command.split(), device]) == 0
    assert fused == [fast] and trained == [(size, torch.device(device), 125.0, fast) for size in groups]
    assert chosen == ([1] if device == 'cuda:1' else [])


@pytest.mark.parametrize(
    'more, message',
    [
        (['--data-dir', 'nowhere'], 'no such folder'),
        (['nowhere.py', '--data-dir', 'data'], 'nowhere.py: no such file'),
        (['train.py', '--data-dir', 'data', '--minutes', '1'], '--minutes is only'),
        (['--data-dir', 'data', '--compile'], 'only for TRAIN_PY'),
        (
            ['--data-dir', 'data', '--schedule', 'own'],
            'cifar10_own.yaml: no such recipe; start this in a clone, with a schedule that it has (here: cifar10.yaml)',
        ),
        (['--data-dir', 'data', '--device', 'gpu'], '--device gpu'),
        (['--data-dir', 'data', '--models', 'resnet_of_mine'], 'has no such name'),
        (['--data-dir', 'data', '--models', 'resnet18 cake=3'], "unexpected keyword argument 'cake'"),
        (['--data-dir', 'data', '--results', 'train.py'], 'cannot be written'),
        (['--data-dir', 'data', '--output', 'a' * 300], 'cannot be written'),
        ('- a', 'is not a mapping'),
        ('a: [', 'cannot be read as a recipe'),
        ('epochs: 1e2', 'no whole number for epochs and batch_size'),
        ('{epochs: 1, batch_size: 16}', 'no opt'),
        ('{epochs: 1, batch_size: 16, model_kwargs: {}}', 'gives model_kwargs; give arguments of networks by --models'),
        ('{epochs: 1, batch_size: 16, gp: max, in_chans: 1}', 'gives gp and in_chans; give'),
        ('{epochs: 1, batch_size: 16, cooldown_epochs: }', 'no schedule can be made of it'),
        (
            ['--data-dir', 'data', '--models', *(f'{ROWS[3]} regulated_stages={x}' for x in ('[1,2]', '(1,2)'))],
            'two ways',
        ),
    ],
)
def test_what_is_missing_is_told_before_training(more, message, clone, capsys, monkeypatch):
    if isinstance(more, str):
        Path('train_recipes/cifar10.yaml').write_text(more)
        more = ['--data-dir', 'data']
    monkeypatch.setattr(reproduce.resident, 'train', lambda *args, **kwargs: pytest.fail('it trains'))
    assert main(['reproduce', '--results', 'results', *more]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_train_py_gets_the_run_and_another_seed_to_go_on_and_what_fails_is_told(clone, capsys, parsers):  # noqa: F811
    """train.py's random numbers begin at the seed whenever it starts: after a stop they must be others."""
    images = reproduce.resident.find_splits('data', 'cifar10')[1]
    run = create_run(TABLES['stages'][3], seed=2, engine='train.py', recipe=SHORT, **images)
    folder = clone / 'runs' / run.name
    folder.mkdir(parents=True)
    (folder / 'last.pth.tar').write_text('of the first epoch')
    (clone / 'timm_regnet_reg.py').write_text('raise ImportError')  # where the command is started
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_top1,eval_top5\n0,2.0,30,80\nepoch,train_loss\n1,1.4')
    command = 'reproduce train.py --data-dir data --results results --seeds 2 --table resnet20 stages --models'.split()
    assert main([*command, 'cifar_resnet20', 'regnet_reg_resnet20_convrnn', str(run.row), '--compile']) == 1
    error = capsys.readouterr().err
    assert '2 of 3 runs are not done' in error and 'out of disk' in error and 'diverged' in error
    [result] = read_results(Path('results', 'cifar10.csv'))
    assert [result[key] for key in ('top1', 'top5', 'train_loss', 'seconds')] == ['90.0', '99.0', '0.5', '']
    given, package = json.loads((folder / 'given').read_text())
    args = parsers['train.py'].parse_args(given)
    assert package == timm_regnet_reg.__file__
    assert (args.model, args.model_kwargs, args.seed) == (run.row.model, run.row.kwargs, 2002)
    assert (args.num_classes, args.input_size, args.crop_pct) == (10, [3, 32, 32], 1.0)  # also of an ImageNet model
    assert yaml.safe_load(Path(args.config).read_text()) == SHORT and 'train_recipes/cifar10' in result['options']
    assert (args.resume, args.torchcompile) == (str(folder / 'last.pth.tar'), 'inductor')
    assert (args.data_dir, args.device, args.workers) == (str(clone / 'data'), 'cpu', 0)


def test_the_last_epoch_is_that_of_the_schedule_with_cooldown_and_warmup(clone, capsys, monkeypatch):
    """The script in place of train.py trains two epochs."""
    for change in (dict(cooldown_epochs=1), dict(warmup_prefix=True, warmup_epochs=1)):
        recipe = {**SHORT, 'sched': 'cosine', **change}
        assert [papers_results.scheduled_epochs({**recipe, 'epochs': epochs}) for epochs in (1, 2)] == [2, 3]
    Path('train_recipes/cifar10.yaml').write_text(yaml.safe_dump(recipe))
    run = subprocess.run  # without `-m timm_regnet_reg run`, which takes seconds to start
    monkeypatch.setattr(subprocess, 'run', lambda command, **kwargs: run([command[0], *command[4:]], **kwargs))
    command = 'reproduce train.py --data-dir data --results results --models regnet_reg_resnet20_convgru'
    assert main(command.split()) == 1
    assert 'train.py ended with code 0' in capsys.readouterr().err and not read_results(Path('results/cifar10.csv'))


def test_timms_train_py_makes_a_row_and_one_that_was_complete_is_not_trained_again(train_script, clone, capsys):  # noqa: F811
    command = ['reproduce', str(train_script), '--data-dir', 'data', '--models', 'cifar_resnet20', '--device', 'cpu']
    assert main([*command, '--results', 'elsewhere']) == 0
    [folder] = [path for path in Path('runs').iterdir() if path.is_dir()]
    lines = (folder / 'summary.csv').read_text().splitlines()
    assert main([*command, '--results', 'results']) == 0
    assert (folder / 'summary.csv').read_text().splitlines() == lines
    [result] = read_results(Path('results', 'cifar10.csv'))
    epochs = list(csv.DictReader(lines))
    assert float(result['top1']) == pytest.approx(float(epochs[1]['eval_top1']), abs=1e-3)
    assert (result['engine'], result['epochs'], result['images']) == ('train.py', '2', '10')
    assert main([*command, '--results', 'results']) == 0
    assert '1 of 1 runs were done before' in capsys.readouterr().out
