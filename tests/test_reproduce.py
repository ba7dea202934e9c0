"""`reproduce`: what it hands to train.py, what it takes up again, and the tables that it makes of the results.

The tests that train need timm's train.py; see test_recipes.py.
"""

import argparse
import ast
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import full_disk
from PIL import Image
from test_recipes import parsers, train_script  # noqa: F401, fixtures

import timm_regnet_reg
from timm_regnet_reg.__main__ import main
from timm_regnet_reg.arguments import _reproduce
from timm_regnet_reg.commands import reproduce
from timm_regnet_reg.commands.reproduce import SCHEDULES, Run
from timm_regnet_reg.errors import UserError
from timm_regnet_reg.papers.results import COLUMNS, ROWS, TABLES, add_result, read_results, report
from timm_regnet_reg.weights.files import lock_folder

ROOT = Path(__file__).resolve().parents[1]
RECIPE = yaml.safe_load((ROOT / 'train_recipes' / 'cifar10.yaml').read_text())


def arguments(tmp_path, *more):
    parser = argparse.ArgumentParser()
    _reproduce(parser)
    folders = ['--output', str(tmp_path / 'runs'), '--results', str(tmp_path / 'results')]
    return parser.parse_args([*folders, *more])


def create_run(tmp_path, *more, row=ROWS[0], seed=0, recipe=RECIPE, train=50000, validation=5000):
    return Run(row, seed, arguments(tmp_path, *more), recipe, {'train': train, 'validation': validation})


def begin(run):
    run.folder.mkdir(parents=True)
    (run.folder / 'settings.json').write_text(json.dumps(run.settings))


def create_result(row, seed, top1, **more):
    result = dict.fromkeys(COLUMNS, '1')
    result.update(model=row.model, arguments=row.arguments, dataset='cifar10', schedule='short', precision='bf16')
    return {**result, 'seed': seed, 'top1': top1, 'parameters': 272474, 'multiply_adds': 40813184, **more}


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('row', ROWS, ids=str)
def test_train_py_understands_every_row(row, schedule, parsers):  # noqa: F811
    options = reproduce.common_options('cifar10', schedule, 'bf16', 'cpu') + reproduce.run_options(row, 7)
    args = parsers['train.py'].parse_args(options)
    assert (args.model, args.seed, args.model_kwargs or {}) == (row.model, 7, row.kwargs)
    assert args.amp and args.amp_dtype == 'bfloat16' and args.torchcompile == 'inductor'
    assert args.epochs == (30 if schedule == 'short' else None)  # the recipe's 164
    timm.create_model(args.model, device='meta', **row.kwargs)


def test_arguments_offer_the_tables_and_schedules():
    parser = argparse.ArgumentParser()
    _reproduce(parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert (set(choices['table']), set(choices['schedule'])) == (set(TABLES), set(SCHEDULES))


@pytest.mark.parametrize(
    'change',
    [
        dict(version='timm_regnet_reg', only_folder=True),
        dict(version='timm', only_folder=True),
        dict(version='torch', only_folder=True),
        dict(recipe={**RECIPE, 'momentum': 0.8}, differ='recipe'),
        dict(train=45000, differ='images'),
        dict(more=['--schedule', 'papers'], only_results=True),
        dict(more=['--float32'], only_results=True),
        dict(row=ROWS[1], only_results=True),
        dict(seed=1, only_results=True),
    ],
)
def test_settings_never_mix(change, tmp_path, monkeypatch):
    """Other training images or another recipe are refused, and what was begun with other versions;
    another schedule, precision, row or seed is another run."""
    change = dict(change)
    separate, version = change.pop('only_results', False), change.pop('version', None)
    differ = change.pop('differ', version)
    run = create_run(tmp_path)
    begin(run)
    results = [] if change.pop('only_folder', False) else [{**dict.fromkeys(COLUMNS, '1'), **run.facts}]
    if version:
        module = {'timm_regnet_reg': reproduce, 'timm': timm, 'torch': torch}[version]
        monkeypatch.setattr(module, '__version__', 'another')
    other = create_run(tmp_path, *change.pop('more', []), **change)
    assert run.check(results) == bool(results) and not run.check([])
    if separate:
        assert other.folder != run.folder and not other.check(results)
        return
    for known in results, []:  # by the results, and by the folder
        with pytest.raises(UserError, match=rf'other settings \((the number of training )?{differ}'):
            other.check(known)


@pytest.mark.parametrize('cuda', [False, True])
def test_the_published_results_stand_in_nobodys_way(cuda, tmp_path, monkeypatch):
    """They are of 5,000 images and a CPU; the whole test set, and a GPU, make rows of their own."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    known = read_results(ROOT / 'train_recipes' / 'results' / 'cifar10.csv')
    assert create_run(tmp_path).check(known) != cuda
    assert not create_run(tmp_path, validation=10000).check(known)


def test_rows_of_one_comparison_have_settings_in_common_and_others_not(tmp_path):
    run = create_run(tmp_path)
    alike = [create_run(tmp_path, row=row, seed=seed) for row in ROWS for seed in (0, 1)]
    assert {other.facts['settings'] for other in alike} == {run.facts['settings']}
    others = [create_run(tmp_path, '--schedule', 'papers'), create_run(tmp_path, train=45000)]
    assert run.facts['settings'] not in {other.facts['settings'] for other in others}


def test_a_folder_of_unknown_origin_is_not_continued(tmp_path):
    run = create_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / 'last.pth.tar').touch()
    with pytest.raises(UserError, match='other settings'):
        run.check([])


def test_comments_of_a_recipe_are_no_settings(tmp_path):
    text = (ROOT / 'train_recipes' / 'cifar10.yaml').read_text()
    without = '\n'.join(line.split('#')[0] for line in text.splitlines())
    assert create_run(tmp_path, recipe=yaml.safe_load(without)).facts == create_run(tmp_path).facts


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert reproduce.newest_checkpoint(tmp_path) == (None, 0)
    for name, epoch in ('checkpoint-3', 3), ('last', 5), ('tmp', 6):
        state = {'epoch': epoch, 'args': argparse.Namespace(model_kwargs={'a': (1,)}), 'x': torch.zeros(10000)}
        torch.save(state, tmp_path / f'{name}.pth.tar')
    assert reproduce.newest_checkpoint(tmp_path) == (tmp_path / 'tmp.pth.tar', 7)
    for name, expected in ('tmp', ('last', 6)), ('last', ('checkpoint-3', 4)):
        file = tmp_path / f'{name}.pth.tar'
        file.write_bytes(file.read_bytes()[:20000])
        assert reproduce.newest_checkpoint(tmp_path) == (tmp_path / f'{expected[0]}.pth.tar', expected[1])


def test_a_run_is_not_begun_anew_over_checkpoints_that_cannot_be_loaded(tmp_path):
    (tmp_path / 'tmp.pth.tar').write_bytes(b'')  # killed before the end of the first epoch
    assert reproduce.newest_checkpoint(tmp_path) == (None, 0)
    (tmp_path / 'last.pth.tar').write_bytes(b'damaged')
    with pytest.raises(UserError, match='last.pth.tar: cannot be loaded'):
        reproduce.newest_checkpoint(tmp_path)


def test_time_left_is_that_of_the_longest_run_if_cores_stay_idle(tmp_path):
    runs = [create_run(tmp_path, seed=seed) for seed in (0, 1, 2)]
    runs[0].done, runs[0].seconds = 15, 15 * 120.0
    runs[1].done, runs[1].seconds = 29, 29 * 60.0
    assert reproduce._time_left(runs[:1], runs[:1], jobs=2) == '; about 0 h 30 min left'
    # at 90 seconds an epoch 22.5 minutes, 1.5 and 45: 69 for one process, and two take as long as the longest run
    assert reproduce._time_left(runs, runs, jobs=1) == '; about 1 h 9 min left'
    assert reproduce._time_left(runs, runs, jobs=2) == '; about 0 h 45 min left'


def test_summary_of_a_run_that_was_resumed_counts_each_epoch_once(tmp_path):
    header = 'epoch,train_loss,eval_top1\n'
    (tmp_path / 'summary.csv').write_text(f'{header}0,2.0,30\n1,1.5,40\n{header}1,1.4,41\n2,1.3')
    assert reproduce.read_summary(tmp_path) == {
        0: {'epoch': 0, 'train_loss': 2.0, 'eval_top1': 30},
        1: {'epoch': 1, 'train_loss': 1.4, 'eval_top1': 41},
    }


def test_results_are_kept_in_the_order_of_the_tables(tmp_path):
    path = tmp_path / 'results' / 'cifar10.csv'
    stage = TABLES['stages'][0]
    for row, seed in (stage, 0), (ROWS[1], 1), (ROWS[0], 1), (ROWS[1], 0):
        add_result(path, create_result(row, seed, 91))
    found = [(result['model'], result['arguments'], result['seed']) for result in read_results(path)]
    plain, rnn = ROWS[0].model, ROWS[1].model
    assert found == [(plain, '', '1'), (rnn, '', '0'), (rnn, '', '1'), (stage.model, 'regulated_stages=(1,)', '0')]
    assert list(path.parent.iterdir()) == [path]


def test_report_has_mean_deviation_and_seeds_and_keeps_precisions_and_settings_apart(tmp_path, capsys):
    """91, 92 and 93 % are errors of 8 ± 1 %; the papers' are SPEC's."""
    path = tmp_path / 'results' / 'cifar10.csv'
    for seed, top1 in enumerate((91, 92, 93)):
        add_result(path, create_result(ROWS[0], seed, top1))
    add_result(path, create_result(ROWS[3], 0, 92.5))
    add_result(path, create_result(ROWS[0], 0, 90, precision='float32'))
    add_result(path, create_result(ROWS[0], 3, 70, settings='2'))
    command = ['reproduce', '--report', '--results', str(path.parent)]
    assert main(command) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith(('| cifar', '| regnet'))]
    assert lines == [
        '| cifar_resnet20 | 0.272M | 40.8M | 8.00 ± 1.00 | 3 | 1.000 | 8.38 |',
        '| regnet_reg_resnet20_convlstm | 0.272M | 40.8M | 7.50 | 1 | 1.000 | 7.28 |',
        '| cifar_resnet20 | 0.272M | 40.8M | 30.00 | 1 | 1.000 | 8.38 |',
        '| cifar_resnet20 | 0.272M | 40.8M | 10.00 | 1 | 1.000 | 8.38 |',
    ]
    picture = path.with_suffix('.png').read_bytes()
    assert main(command) == 0 and path.with_suffix('.png').read_bytes() == picture
    with full_disk(4):
        assert main(command) == 1
    assert 'could not be written' in capsys.readouterr().err and path.with_suffix('.png').read_bytes() == picture
    assert Image.open(path.with_suffix('.png')).size == (1800, 450)


def test_report_says_what_was_trained_with(tmp_path):
    results = [create_result(ROWS[0], seed, 91, torch=torch) for seed, torch in ((0, '2.15.0'), (1, '2.16.0'))]
    assert 'torch 2.15.0 and 2.16.0, python 1:' in report(results)


@pytest.mark.parametrize(
    'more, message',
    [
        (['--report'], 'no results yet'),
        ([], 'TRAIN_PY and --data-dir'),
        (['nowhere.py', '--data-dir', '.'], 'no such file'),
        ([__file__, '--data-dir', 'nowhere'], 'PNG images of 0 classes'),
    ],
)
def test_what_is_missing_is_said_at_once(more, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(['reproduce', *more, '--results', str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.fixture
def data(tmp_path):
    """One batch to train on, and an image a class to score."""
    for split, size, number in ('train', 40, 13), ('validation', 32, 1):
        for label in range(10):
            folder = tmp_path / 'data' / split / f'class{label}'
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{index}.png')
    return tmp_path / 'data'


def test_images_that_are_not_padded_are_refused(data):
    for file in (data / 'train').rglob('*.png'):
        Image.open(file).resize((32, 32)).save(file)
    with pytest.raises(UserError, match='images of 32x32, expected 40x40'):
        reproduce.check_data(str(data), 'cifar10')


def test_a_run_survives_sigkill_and_is_skipped_when_done(train_script, data, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Killed after some epochs, it goes on after them, and its process with it; a second start has nothing to do.

    In float32: the first compilation takes minutes.
    """
    monkeypatch.chdir(ROOT)
    command = ['reproduce', str(train_script), '--data-dir', str(data), '--models', 'cifar_resnet20', '--float32']
    command += ['--output', str(tmp_path / 'runs'), '--results', str(tmp_path / 'results')]
    process = subprocess.Popen([sys.executable, '-m', 'timm_regnet_reg', *command], stdout=subprocess.PIPE, text=True)
    begun = next(line for line in process.stdout if 'epoch 3 of 30' in line or 'epoch 4 of 30' in line)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    assert main(command) == 0
    out = capfd.readouterr().out
    assert 'goes on after epoch' in out and 'epoch 30 of 30' in out and 'epoch 2 of 30' not in out, (begun, out)
    [result] = read_results(tmp_path / 'results' / 'cifar10.csv')
    [folder] = (tmp_path / 'runs').iterdir()
    with open(folder / 'summary.csv') as file:
        last = [line for line in csv.reader(file)][-1]
    assert last[0] == '29' and float(result['top1']) == pytest.approx(float(last[3]), abs=1e-3)
    assert (result['images'], result['parameters'], result['epochs']) == ('10', '272474', '30')
    assert reproduce.newest_checkpoint(folder)[1] == 30

    assert main(command) == 0
    assert '1 of 1 runs were done before' in capfd.readouterr().out


def test_a_run_that_fails_is_reported_and_the_others_go_on(data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    script = tmp_path / 'train.py'
    script.write_text('raise SystemExit("out of disk")')
    folders = ['--output', str(tmp_path / 'runs'), '--results', str(tmp_path / 'results')]
    models = ['cifar_resnet20', 'regnet_reg_resnet20_convgru']
    assert main(['reproduce', str(script), '--data-dir', str(data), '--models', *models, '--jobs', '2', *folders]) == 1
    assert '2 of 2 runs failed' in (err := capfd.readouterr().err) and 'out of disk' in err


@pytest.mark.parametrize('spoiled', ['seconds', 'log.txt'])
def test_a_run_whose_folder_cannot_be_written_does_not_end_the_others(spoiled, tmp_path, capfd):
    runs = [create_run(tmp_path, seed=seed) for seed in (0, 1)]
    for run in runs:
        begin(run)
    (runs[0].folder / spoiled).mkdir()
    script = tmp_path / 'train.py'
    script.write_text(
        'import sys, time\n'
        'path = sys.argv[sys.argv.index("--experiment") + 1]\n'
        'with open(f"{sys.argv[sys.argv.index(\'--output\') + 1]}/{path}/summary.csv", "w") as file:\n'
        '    file.write("epoch,train_loss,eval_top1,eval_top5\\n29,0.5,90,99\\n")\n'
        'time.sleep(600 if path.endswith("seed0") else 5)\n'
    )
    results = tmp_path / 'results' / 'cifar10.csv'
    [failed] = reproduce.train(runs, results, str(script), 'DIR', jobs=2)
    assert 'seed 0' in failed and spoiled in failed
    assert [result['seed'] for result in read_results(results)] == ['1']
    assert spoiled == 'log.txt' or runs[0].process.poll() is not None
    for run in runs:
        os.close(lock_folder(run.folder, seconds=0))


def test_a_run_in_use_by_another_process_is_left_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, 'LOCK_SECONDS', 0)
    run = create_run(tmp_path)
    begin(run)
    lock = lock_folder(run.folder, seconds=0)
    with pytest.raises(UserError, match='in use by another process'):
        run.start('train.py', str(data), 1, tmp_path / 'cifar10.csv')
    os.close(lock)


def start(run, tmp_path, script='', results=()):
    """Start a run with a train.py of its own; what it was given is in the folder's log."""
    path = tmp_path / 'results' / 'cifar10.csv'
    for result in results:
        add_result(path, result)
    (tmp_path / 'train.py').write_text(f'import sys\nprint(sys.argv)\n{script}')
    started = run.start(str(tmp_path / 'train.py'), 'DIR', 1, path)
    if started:
        run.process.wait()
    return started, path


def test_a_run_that_another_process_has_finished_is_not_trained_again(tmp_path):
    """The results, and who holds the folder, are looked at again when a run's turn comes."""
    run = create_run(tmp_path)
    assert not run.check([])
    result = create_result(ROWS[0], 0, 91, device='cpu', images='5000', settings=run.facts['settings'])
    assert start(run, tmp_path, results=[result])[0] is False
    os.close(lock_folder(run.folder, seconds=0))
    with pytest.raises(UserError, match='has a row of this run'):
        add_result(tmp_path / 'results' / 'cifar10.csv', result)


def test_a_run_that_another_process_has_begun_with_other_settings_is_left_alone(tmp_path):
    run = create_run(tmp_path)
    other = create_run(tmp_path, recipe={**RECIPE, 'momentum': 0.8})
    begin(other)
    with pytest.raises(UserError, match='other settings'):
        start(run, tmp_path)
    assert json.loads((run.folder / 'settings.json').read_text())['recipe']['momentum'] == 0.8


def test_a_run_goes_on_with_its_own_recipe_and_another_seed(tmp_path):
    """train.py's random numbers begin at the seed whenever it starts: after a stop they must be others."""
    run = create_run(tmp_path, seed=2)
    begin(run)
    torch.save({'epoch': 6, 'args': argparse.Namespace()}, run.folder / 'last.pth.tar')
    assert start(run, tmp_path)[0]
    arguments = ast.literal_eval((run.folder / 'log.txt').read_text().splitlines()[-1])
    given = {key: value for key, value in zip(arguments, arguments[1:]) if key.startswith('--')}  # the last one counts
    assert given['--resume'] == str(run.folder / 'last.pth.tar') and given['--seed'] == '7002'
    assert given['--config'] == str(run.folder / 'recipe.yaml')
    assert yaml.safe_load(Path(given['--config']).read_text()) == RECIPE
    run.stop()


def test_a_run_forgets_the_epochs_that_no_checkpoint_holds(tmp_path):
    run = create_run(tmp_path)
    begin(run)
    lines = [f'{epoch},0.5,{epoch},99' for epoch in range(30)]
    (run.folder / 'summary.csv').write_text('\n'.join(['epoch,train_loss,eval_top1,eval_top5', *lines, '']))
    torch.save({'epoch': 6, 'args': argparse.Namespace()}, run.folder / 'last.pth.tar')
    path = start(run, tmp_path)[1]  # a train.py that ends without a word
    known = reproduce.read_summary(run.folder)
    assert list(known) == list(range(7)) and known[6]['eval_top1'] == 6
    assert run.progress() is None
    with pytest.raises(UserError, match='train.py ended with code 0'):
        run.finish(path)
    run.stop()


@pytest.mark.skipif(not Path('/proc/self/autogroup').exists(), reason='no Linux that shares time out by sessions')
def test_a_run_gives_way_to_other_work(tmp_path):
    run = create_run(tmp_path)
    start(run, tmp_path, 'import os\nprint(os.nice(0), open("/proc/self/autogroup").read().split()[-1])')
    assert (run.folder / 'log.txt').read_text().splitlines()[-1] == '19 19'
    run.stop()


def test_a_run_trains_with_the_package_that_started_it(tmp_path, monkeypatch):
    """And not with a clone's, in whose folder an installed one is started."""
    other = tmp_path / 'timm_regnet_reg'
    other.mkdir()
    (other / '__init__.py').touch()
    monkeypatch.chdir(tmp_path)
    run = create_run(tmp_path)
    start(run, tmp_path, 'import timm_regnet_reg\nprint(timm_regnet_reg.__file__)')
    assert (run.folder / 'log.txt').read_text().splitlines()[-1] == timm_regnet_reg.__file__
    run.stop()


def train_to(run, tmp_path, figures):
    """Start a run with a train.py that writes a summary of one epoch; where its results belong."""
    summary = f'epoch,train_loss,eval_top1,eval_top5\n{figures}\n'
    return start(run, tmp_path, f'open({str(run.folder / "summary.csv")!r}, "w").write({summary!r})')[1]


def test_a_training_that_diverged_makes_no_row(tmp_path):
    run = create_run(tmp_path)
    path = train_to(run, tmp_path, '29,nan,10,50')
    with pytest.raises(UserError, match='diverged'):
        run.finish(path)
    assert read_results(path) == []
    run.stop()
    os.close(lock_folder(run.folder, seconds=0))


def test_cifar100_makes_a_table_of_its_own(tmp_path):
    recipe = yaml.safe_load((ROOT / 'train_recipes' / 'cifar100.yaml').read_text())
    run = create_run(tmp_path, '--dataset', 'cifar100', recipe=recipe)
    assert run.folder != create_run(tmp_path).folder
    path = train_to(run, tmp_path, '29,1.0,65,90')
    run.finish(path)
    run.stop()
    [result] = read_results(path)
    assert int(result['parameters']) == 272474 + 90 * (64 + 1)  # the classifier's further classes
    assert '--config train_recipes/cifar100.yaml' in result['options']
    assert '| 35.00 | 1 | 1.000 | 31.72 |' in report([result])  # the paper's error beside it


def write_results(path, *results):
    path.parent.mkdir(parents=True)
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(results)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(top1='ab'), 'could not convert'),
        (dict(top1='nan'), 'cannot be'),
        (dict(top1='200'), 'cannot be'),
        (dict(train_loss='inf'), 'cannot be'),
        (dict(images=''), 'invalid literal'),
        (dict(model='resnet50'), 'no row of the tables'),
        (dict(dataset='mnist'), 'data set mnist'),
        (None, 'two rows'),
    ],
)
def test_damaged_results_make_no_table(change, message, tmp_path, capsys):
    result = {**create_result(ROWS[0], 0, 90.0), **(change or {})}
    write_results(tmp_path / 'r' / 'cifar10.csv', *[result] * (1 if change else 2))
    assert main(['reproduce', '--report', '--results', str(tmp_path / 'r')]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and not captured.out


@pytest.mark.parametrize('content', [b'', b'model\nx\n', b'\xff\xfe\x00'], ids=str)
def test_a_file_that_holds_no_results_makes_no_table(content, tmp_path, capsys):
    (tmp_path / 'cifar10.csv').write_bytes(content)
    assert main(['reproduce', '--report', '--results', str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize('content', ['', '{', '[]', 'null'])
def test_a_run_whose_settings_are_damaged_is_not_continued(content, tmp_path):
    run = create_run(tmp_path)
    begin(run)
    (run.folder / 'settings.json').write_text(content)
    with pytest.raises(UserError, match='other settings'):
        run.check([])


def clone_with_data(tmp_path, recipe='epochs: 1\n'):
    (tmp_path / 'train_recipes').mkdir()
    (tmp_path / 'train_recipes' / 'cifar10.yaml').write_text(recipe)
    (tmp_path / 'train.py').write_text('raise SystemExit(3)')
    for split, size in (('train', 40), ('validation', 32)):
        for label in range(10):
            folder = tmp_path / 'data' / split / str(label)
            folder.mkdir(parents=True)
            Image.new('RGB', (size, size)).save(folder / 'a.png')


@pytest.mark.parametrize(
    'more, message',
    [
        (['--results', 'train.py'], 'cannot be written'),
        (['--output', 'train.py'], 'cannot be written'),
        (['--results', 'a' * 300], 'cannot be written'),
        (['--output', 'a' * 300], 'cannot be written'),
        (['--data-dir', 'a' * 300], 'of 0 classes'),
        (['--data-dir', 'damaged'], 'cannot be read as an image'),
        ('- a', 'cannot be read as a recipe'),
        ('a: [', 'cannot be read as a recipe'),
    ],
)
def test_what_cannot_be_used_is_told_before_training(more, message, tmp_path, capsys, monkeypatch):
    clone_with_data(tmp_path, *([more] if isinstance(more, str) else []))
    if 'damaged' in more:
        (tmp_path / 'data').rename(tmp_path / 'damaged')
        (tmp_path / 'damaged' / 'train' / '0' / 'a.png').write_bytes(b'')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, 'start', lambda *args: pytest.fail('it trains'))
    more = [] if isinstance(more, str) else more
    assert main(['reproduce', 'train.py', '--data-dir', 'data', *more]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_seed_or_table_given_twice_trains_once(tmp_path, monkeypatch):
    clone_with_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    trained = []
    monkeypatch.setattr(reproduce, 'train', lambda runs, *args: trained.extend(map(str, runs)))
    twice = ['--seeds', '0', '0', '--table', 'resnet20', 'resnet20']
    assert main(['reproduce', 'train.py', '--data-dir', 'data', *twice]) == 0
    assert len(trained) == len(set(trained)) == len(TABLES['resnet20'])
