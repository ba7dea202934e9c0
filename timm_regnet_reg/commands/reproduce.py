"""Train the papers' CIFAR tables, and report the results beside theirs.

    regnet-reg cifar DIR
    regnet-reg reproduce --data-dir DIR
    regnet-reg reproduce --data-dir DIR --device cuda --amp --seeds 0 1 2 3 4
    regnet-reg reproduce path/to/train.py --data-dir DIR --compile
    regnet-reg reproduce --report

Start this in a clone of this project, where train_recipes/ is. Tables: resnet20 (the plain network and three cells),
seresnet20 (the same with Squeeze-and-Excitation), stages (one regulated stage) and depth (32 and 56 layers). --models
takes others of timm's, too: resnet18, or 'regnet_reg_resnet20_convlstm cell_weight_decay=False'. A schedule is a recipe
in train_recipes/: papers is {dataset}.yaml (164 epochs), any other NAME is {dataset}_NAME.yaml. For cifar10 there are
short (30 epochs) and strong (200); add your own.

A GPU trains eight networks at once, each update a CUDA graph, compiled and with fused steps (given Triton and compute
capability 8.0). A CPU trains one: start the command twice on two cores, with OMP_NUM_THREADS=1, and each takes the runs
that the other doesn't have. With TRAIN_PY, train.py's path in a clone of timm, that script trains instead.

Stop it whenever you like and start it again: what is done is skipped, and what was begun goes on. It does exactly where
it was saved, every 30 seconds, on another device too (but for the random numbers of dropout and the like); with
train.py after its last complete epoch, and with another seed, as its random numbers start anew (end a train.py whose
command was killed by force before you start again). Checkpoints, which `regnet-reg package` takes, are in --output.

A run adds a row to {dataset}.csv in --results: accuracy of the last epoch, not the best, on all images of validation/,
in the precision it trains in. --report prints its errors, mean and standard deviation over seeds, beside the papers',
and draws them over the parameters in {dataset}.png. Engines make tables of their own.
"""

import argparse
import csv
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import timm
import torch
import yaml

from .. import __version__
from ..arguments import add_device, count, positive
from ..errors import InUse, UserError, reason
from ..fused import available, set_fused
from ..papers import flops, output, resident
from ..papers.cifar import CLASSES, SIZE
from ..papers.results import TABLES, Row, Run, add_result, draw, find_row, read_results, report, scheduled_epochs
from ..weights.files import check_writable, locked
from ..weights.scoring import check_device

AT_ONCE = 8  # networks on a GPU

# what may be the matter with one run, its folder and its files; other runs go on
TROUBLE = (RuntimeError, OSError, ValueError, csv.Error, MemoryError)  # UserErrors and torch's are RuntimeErrors


def _choose(tables: List[str], models: Optional[List[str]]) -> List[Row]:
    rows = [row for table in tables for row in TABLES[table]]
    chosen: List[Row] = []
    for name in (' '.join(model.split()) for model in models or []):
        chosen += [row for row in rows if name in (row.model, str(row))] or [find_row(*name.partition(' ')[::2])]
    return list(dict.fromkeys(chosen or rows))


def _count(row: Row, dataset: str) -> Dict[str, int]:
    """The columns of a network's size; a UserError if timm has no such network for CIFAR's images."""
    try:
        if not timm.is_model(row.model):  # nor local-dir:FOLDER, where another network may lie the next time
            raise ValueError('timm.list_models() has no such name')
        kwargs = {**row.kwargs, 'pretrained': False}
        counts = flops.count(row.model, (3, SIZE, SIZE), num_classes=CLASSES[dataset], **kwargs)
    except Exception as error:  # networks raise whatever they stumble over
        told = ' '.join(reason(error).split())
        raise UserError(f"--models '{row}': can't be made for {SIZE}x{SIZE} images: {told}; correct it") from error
    return dict(zip(('parameters', 'multiply_adds'), counts))


def _options(run: Run, recipe: Path) -> List[str]:
    """What train.py is given of a run."""
    amp = ['--amp', '--amp-dtype', run.amp_dtype] if run.amp_dtype else []
    kwargs = ['--model-kwargs', *shlex.split(run.row.arguments)] if run.row.arguments else []
    data = f'--num-classes {CLASSES[run.dataset]} --input-size 3 {SIZE} {SIZE} --crop-pct 1'.split()
    return ['--config', str(recipe), *amp, '--model', run.row.model, *kwargs, '--seed', str(run.seed), *data]


def _summary(folder: Path) -> List[Dict[str, str]]:
    """What train.py wrote of the epochs; when it goes on, it writes another header."""
    path = folder / 'summary.csv'
    lines = csv.DictReader(path.read_text().splitlines()) if path.exists() else []
    return [line for line in lines if line['epoch'].isdecimal()]


def train_by_script(run: Run, folder: Path, script: List[str]) -> Dict[str, Any]:
    """Train a run by train.py, from the start or after its last checkpoint, and give columns of its row.

    `script` is the path of train.py and options that are no part of the run. A UserError if train.py fails, or the
    training diverged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log, recipe = folder / 'last.pth.tar', folder / 'log.txt', folder / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump(run.recipe))  # as it was read: the file may have changed since
    command = [sys.executable, '-m', 'timm_regnet_reg', 'run', *script]  # `run`, as a clone has a timm of its own
    command += [*_options(run, recipe), '--output', str(folder.parent), '--experiment', folder.name]
    command += ['--checkpoint-hist', '1']
    if resumed := checkpoint.exists():
        command += ['--resume', str(checkpoint), '--seed', str(run.seed + 1000 * len(_summary(folder)))]
    print(f'{run}: {"goes on" if resumed else "starts"}; see {log}', flush=True)
    start = time.monotonic()
    with open(log, 'ab') as file:
        package = Path(__file__).parents[2]  # where -m looks first: for this package, and not a clone's
        code = subprocess.run(command, cwd=package, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
    last = [line for line in _summary(folder) if int(line['epoch']) == int(run.identity['epochs']) - 1]
    if code or not last:
        end = '\n  '.join(log.read_text(errors='replace').splitlines()[-5:])
        raise UserError(f'train.py ended with code {code}; the end of {log}:\n  {end}')
    # an epoch that was trained again has several lines, and the last one counts
    loss, top1, top5 = (float(last[-1][key]) for key in ('train_loss', 'eval_top1', 'eval_top5'))
    if not math.isfinite(loss):
        raise UserError(f'the training diverged and makes no row; see {folder}, and remove it to start over')
    seconds = '' if resumed else round(time.monotonic() - start)  # of how many processes isn't known
    return {'top1': round(top1, 3), 'top5': round(top5, 3), 'train_loss': round(loss, 5), 'seconds': seconds}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('train_py', metavar='TRAIN_PY', nargs='?', help="path of timm's train.py, if it is to train")
    parser.add_argument('--data-dir', metavar='DIR', help='the folder that `regnet-reg cifar` wrote')
    parser.add_argument('--dataset', choices=[*CLASSES], default='cifar10', help='default: cifar10')
    parser.add_argument('--table', nargs='+', choices=[*TABLES], default=['resnet20'], help='default: resnet20')
    parser.add_argument(
        '--models', nargs='+', metavar='MODEL', help="only these: rows of --table, or 'MODEL ARGUMENTS' of timm"
    )
    parser.add_argument('--seeds', nargs='+', type=count, default=[0], metavar='N', help='default: 0')
    parser.add_argument('--schedule', default='papers', metavar='NAME', help='name of a recipe (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='train in bfloat16 (autocast) instead of float32')
    parser.add_argument('--compile', action='store_true', help='compile the networks (only with TRAIN_PY)')
    add_device(parser)
    parser.add_argument('--minutes', type=positive, metavar='M', help='save and stop in time (not with TRAIN_PY)')
    parser.add_argument('--output', default='runs', metavar='DIR', help='for logs and checkpoints (default: ./runs)')
    parser.add_argument('--results', default='train_recipes/results', metavar='DIR', help='default: %(default)s')
    parser.add_argument('--report', action='store_true', help='print and draw all results of --dataset instead')


def main(args: argparse.Namespace) -> None:
    """Train what is missing, or report what is there; a UserError if something is missing, or runs failed."""
    results = Path(args.results, f'{args.dataset}.csv')
    if args.report:
        known = read_results(results)
        if not known:
            raise UserError(f'{results}: no results yet; train first')
        print(report(known))
        output.check_matplotlib()
        draw(known, results.with_suffix('.png'))
        return

    stop = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    if not args.data_dir:
        raise UserError('--data-dir is needed to train; --report alone needs none')
    if args.train_py and not os.path.isfile(args.train_py):
        raise UserError(f'{args.train_py}: no such file; expected the path of train.py in a clone of timm')
    if args.train_py and args.minutes:
        raise UserError('--minutes is only for training without TRAIN_PY, which knows no such limit; leave it out')
    if args.compile and not args.train_py:
        raise UserError('--compile is only for TRAIN_PY; leave it out: a GPU compiles by itself where it can')
    path = Path('train_recipes', args.dataset + ('' if args.schedule == 'papers' else f'_{args.schedule}') + '.yaml')
    if not path.exists():
        told = ', '.join(sorted(path.name for path in path.parent.glob('*.yaml'))) or 'none'
        raise UserError(f'{path}: no such recipe; start this in a clone, with a schedule that it has (here: {told})')
    recipe = resident.read_recipe(path)
    if wrong := [key for key in ('epochs', 'batch_size') if type(recipe.get(key)) is not int]:
        raise UserError(f'{path}: gives no whole number for {" and ".join(wrong)}; correct it')
    if wrong := [key for key in ('model_kwargs', 'gp', 'in_chans') if key in recipe]:
        raise UserError(f'{path}: gives {" and ".join(wrong)}; give arguments of networks by --models instead')
    try:
        scheduled_epochs(recipe)
    except Exception as error:  # whatever timm makes of wrong options
        raise UserError(f'{path}: no schedule can be made of it ({reason(error)}); correct it') from error
    if args.amp:
        recipe.update(amp=True, amp_dtype='bfloat16')
    if not args.train_py:
        resident.check_recipe(recipe)
    device = check_device(args.device)
    found, known_by = resident.find_splits(args.data_dir, args.dataset)
    alike = 'train.py' if args.train_py else 'resident', recipe, known_by
    rows = _choose(args.table, args.models)
    runs = [Run(row, args.dataset, args.schedule, seed, *alike) for seed in dict.fromkeys(args.seeds) for row in rows]
    if len({run.name for run in runs}) < len(runs):
        raise UserError('two of --models are one network, written in two ways; give one of them')
    check_writable(args.output, folder=True)
    check_writable(results)
    known = read_results(results)
    todo = [run for run in runs if not run.has_result(known)]
    print(f'{len(runs) - len(todo)} of {len(runs)} runs were done before', flush=True)
    if not todo:
        return
    counts = {row: _count(row, args.dataset) for row in dict.fromkeys(run.row for run in todo)}

    if gpu := device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)  # for streams
    versions = {'device': torch.cuda.get_device_name() if gpu else 'cpu', 'python': platform.python_version()}
    versions.update(timm_regnet_reg=__version__, timm=timm.__version__)
    versions['torch'] = str(torch.__version__)  # a class of its own, which checkpoints don't take
    images = None if args.train_py else resident.read_images(found, device)
    fast = gpu and not args.train_py and available()
    set_fused(fast)
    script = [os.path.abspath(args.train_py or ''), '--data-dir', os.path.abspath(args.data_dir)]
    script += ['--device', args.device, *(['--torchcompile', 'inductor'] if args.compile else [])]
    script += [] if gpu else ['--workers', '0']  # a CPU has no time for processes that wait for it
    failed: List[str] = []

    @contextmanager
    def others_go_on(run: Run) -> Iterator[None]:
        try:
            yield
        except TROUBLE as error:
            failed.append(f'{run}: {reason(error)}')
            print(failed[-1], file=sys.stderr, flush=True)

    number, at_once = len(todo), AT_ONCE if gpu and images else 1
    while todo and time.monotonic() < stop:
        group, todo = todo[:at_once], todo[at_once:]
        with ExitStack() as claims:
            claimed: Dict[Run, Path] = {}
            for run in group:
                folder = Path(args.output, run.name).absolute()
                with others_go_on(run):
                    try:
                        claims.enter_context(locked(folder, seconds=0))
                        if not run.has_result(read_results(results)):  # which another process may have added
                            claimed[run] = folder
                    except InUse:
                        print(f'{run}: another process has it', flush=True)
            if images:
                trained = resident.train(claimed, images, versions, others_go_on, stop, compiled=fast)
            else:
                trained = ((run, {}) for run in claimed)  # by train.py, below
            for run, measured in trained:
                with others_go_on(run):
                    if not images:
                        measured = train_by_script(run, claimed[run], script)
                    facts = {**run.identity, **counts[run.row], **versions, 'options': shlex.join(_options(run, path))}
                    add_result(results, {**facts, **measured})
                    print(f'{run}: done, top-1 {measured["top1"]:.2f} %', flush=True)
    if failed:
        raise UserError(f'{len(failed)} of {number} runs are not done:\n' + '\n'.join(failed))
    if time.monotonic() >= stop:
        print('Stopped in time; the same command goes on with what is not done.')
