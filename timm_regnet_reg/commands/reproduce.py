"""Train the papers' CIFAR tables, and report the results beside theirs.

    regnet-reg cifar DIR
    regnet-reg reproduce --data-dir DIR
    regnet-reg reproduce --data-dir DIR --device cuda --amp --compile --seeds 0 1 2 3 4
    regnet-reg reproduce path/to/train.py --data-dir DIR
    regnet-reg reproduce --report

Start this in a clone of this project, where train_recipes/ is. Tables: resnet20 (the plain network and three cells),
seresnet20 (the same with Squeeze-and-Excitation), stages (one regulated stage), depth (32 and 56 layers). A schedule is
a recipe: papers is train_recipes/{dataset}.yaml (164 epochs), short (30 epochs) and strong (200 epochs) are
train_recipes/cifar10_{schedule}.yaml.

All images lie on the device. A GPU trains several networks at once, and an update is a CUDA graph. A CPU trains one
network after the other; on two cores start the command twice, with OMP_NUM_THREADS=1: each takes the runs that the
other doesn't have. With TRAIN_PY, the path of train.py in a clone of timm's repository
(github.com/huggingface/pytorch-image-models), that script trains instead, in a process for each run.

Stop it whenever you like and start it again: what is done is skipped, and what was begun goes on. The engine saves
every 30 seconds and goes on exactly there, on another device too. train.py goes on after its last complete epoch, with
other random numbers: its own start at the seed again, so that they get seed + 1000 * epochs done. (End a train.py whose
command was killed by force before you start again.) Checkpoints, which `regnet-reg package` takes, are in --output.

A run adds a row to {dataset}.csv in --results: accuracy of the last epoch, not the best, on all images of validation/,
in the precision it trains in. --report reads that file alone: it prints the error, mean and standard deviation over
seeds, beside the papers', and draws it over the parameters in {dataset}.png. Engines make tables of their own.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import timm
import torch
import yaml

from .. import __version__
from ..arguments import add_device, positive
from ..arguments import count as whole_number
from ..errors import UserError, reason
from ..papers import resident
from ..papers.cifar import CLASSES, SIZES
from ..papers.flops import count
from ..papers.plots import plot_folder
from ..papers.results import TABLES, Row, Run, add_result, draw, read_results, report
from ..weights.files import check_writable, locked
from ..weights.scoring import check_device

AT_ONCE = 4  # networks on a GPU

# what may be the matter with one run, its folder and its files; other runs go on
TROUBLE = (UserError, OSError, MemoryError, ValueError, csv.Error, torch.OutOfMemoryError)


def read_recipe(dataset: str, schedule: str) -> Tuple[Path, Dict[str, Any]]:
    """The recipe of a schedule, and its place.

    Raises:
        UserError: There is none, or it can't be read.
    """
    path = Path('train_recipes', f'{dataset}.yaml' if schedule == 'papers' else f'{dataset}_{schedule}.yaml')
    if not path.is_file():
        raise UserError(f'{path}: no such file; start this in a clone of this project, with a schedule that it has')
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
        if not isinstance(recipe, dict) or not isinstance(recipe.get('epochs'), int):
            raise ValueError('it gives no number of epochs')
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{path}: cannot be read as a recipe ({" ".join(str(error).split())}); restore it') from error
    return path, recipe


def epochs_done(checkpoint: Path) -> int:
    """The number of epochs that a checkpoint of train.py has seen; 0 if there is none.

    Raises:
        UserError: It can't be loaded.
    """
    if not checkpoint.exists():
        return 0
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # train.py's own arguments
            return torch.load(checkpoint, map_location='cpu', weights_only=True)['epoch'] + 1
    except Exception as error:  # whatever torch stumbles over in a damaged file
        raise UserError(f'{checkpoint}: cannot be loaded ({reason(error)}); remove its folder to start over') from error


def read_summary(folder: Path) -> Dict[int, Dict[str, float]]:
    """The figures of train.py's summary.csv by epoch. What a resumed run writes again replaces what it wrote before."""
    epochs = {}
    path = folder / 'summary.csv'
    for line in csv.DictReader(path.read_text().splitlines() if path.exists() else []):
        try:
            figures = {key: float(value) for key, value in line.items()}
        except (TypeError, ValueError):  # the header of a resumed run, or half a line of one that was killed
            continue
        epochs[int(figures['epoch'])] = figures
    return epochs


def _options(run: Run, recipe: Path) -> List[str]:
    """What train.py is given of a run."""
    amp = ['--amp', '--amp-dtype', 'bfloat16'] if run.recipe.get('amp') else []
    kwargs = ['--model-kwargs', *run.row.arguments.split()] if run.row.arguments else []
    return ['--config', str(recipe), *amp, '--model', run.row.model, *kwargs, '--seed', str(run.seed)]


def train_by_script(run: Run, folder: Path, options: List[str]) -> Dict[str, Any]:
    """Train a run by train.py, from the start or after its last complete epoch.

    Args:
        run: The run.
        folder: Of its log and checkpoints.
        options: The path of train.py, the run's options, and others that are no part of the run.

    Returns:
        Columns of the run's row.

    Raises:
        UserError: The run's checkpoint can't be loaded, train.py failed, or the training diverged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / 'last.pth.tar', folder / 'log.txt'
    done, epochs = epochs_done(checkpoint), run.recipe['epochs']
    command = [sys.executable, '-m', 'timm_regnet_reg', 'run', *options]  # `run`, as a clone has a timm of its own
    command += ['--output', str(folder.parent), '--experiment', folder.name, '--checkpoint-hist', '1']
    command += ['--resume', str(checkpoint), '--seed', str(run.seed + 1000 * done)] if done else []
    print(f'{run}: {f"goes on after epoch {done}" if done else "starts"}; see {log}', flush=True)
    start, code = time.monotonic(), 0
    if done < epochs:
        with open(log, 'ab') as file:
            package = Path(__file__).parents[2]  # where -m looks first: for this package, and not a clone's
            code = subprocess.run(command, cwd=package, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
    last = read_summary(folder).get(epochs - 1)
    if last is None or epochs_done(checkpoint) < epochs:
        end = '\n  '.join(log.read_text(errors='replace').splitlines()[-5:]) if log.exists() else ''
        raise UserError(f'train.py ended with code {code}; the end of {log}:\n  {end}')
    if not math.isfinite(last['train_loss']):
        raise UserError(f'the training diverged and makes no row; see {folder}, and remove it to start over')
    return {
        'top1': round(last['eval_top1'], 3),
        'top5': round(last['eval_top5'], 3),
        'train_loss': round(last['train_loss'], 5),
        'seconds': '' if done else round(time.monotonic() - start),  # of how many processes isn't known
    }


def _choose(tables: List[str], models: Optional[List[str]]) -> List[Row]:
    rows = list(dict.fromkeys(row for table in tables for row in TABLES[table]))
    known = {name for row in rows for name in (row.model, str(row))}
    if unknown := [model for model in models or [] if model not in known]:
        raise UserError(
            f'--models {" ".join(unknown)}: not in --table {" ".join(tables)}, which has {", ".join(sorted(known))}'
        )
    return [row for row in rows if not models or {row.model, str(row)} & {*models}]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('train_py', metavar='TRAIN_PY', nargs='?', help="path of timm's train.py, if it is to train")
    parser.add_argument('--data-dir', metavar='DIR', help='the folder that `regnet-reg cifar` wrote')
    parser.add_argument('--dataset', choices=['cifar10', 'cifar100'], default='cifar10', help='default: cifar10')
    parser.add_argument('--table', nargs='+', choices=[*TABLES], default=['resnet20'], help='default: resnet20')
    parser.add_argument(
        '--models', nargs='+', metavar='MODEL', help="only these; a single row is 'MODEL ARGUMENTS' (default: all)"
    )
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=whole_number,
        default=[0],
        metavar='N',
        help='default: 0; all models are trained with one before the next',
    )
    parser.add_argument('--schedule', choices=['papers', 'short', 'strong'], default='papers', help='default: papers')
    parser.add_argument('--amp', action='store_true', help='train in bfloat16 (autocast) instead of float32')
    parser.add_argument('--compile', action='store_true', help='compile the networks, which takes minutes at the start')
    add_device(parser)
    parser.add_argument('--minutes', type=positive, metavar='M', help='save and stop in time (not with TRAIN_PY)')
    parser.add_argument('--output', default='runs', metavar='DIR', help='for logs and checkpoints (default: ./runs)')
    parser.add_argument(
        '--results', default='train_recipes/results', metavar='DIR', help='for the CSV files (default: %(default)s)'
    )
    parser.add_argument('--report', action='store_true', help='print and draw all results of --dataset instead')


def main(args: argparse.Namespace) -> None:
    """Train what is missing, or report what is there.

    Raises:
        UserError: Something is missing, or runs failed.
    """
    results = Path(args.results, f'{args.dataset}.csv')
    if args.report:
        known = read_results(results)
        if not known:
            raise UserError(f'{results}: no results yet; train first')
        print(report(known))
        plot_folder(args.results)
        draw(known, results.with_suffix('.png'))
        return

    stop = time.monotonic() + 60 * args.minutes if args.minutes else math.inf
    if not args.data_dir:
        raise UserError('--data-dir is needed to train; --report alone needs none')
    if args.train_py and (args.minutes or not os.path.isfile(args.train_py)):
        raise UserError(
            f"{args.train_py}: expected train.py of a clone of timm's repository, and no --minutes, which it can't keep"
        )
    path, recipe = read_recipe(args.dataset, args.schedule)
    if args.amp:
        recipe.update(amp=True, amp_dtype='bfloat16')
    if not args.train_py:
        resident.check_recipe(recipe)
    device = check_device(args.device)
    classes = CLASSES[args.dataset]
    counts = {split: len(resident.find_images(args.data_dir, split, classes)) for split in SIZES}
    engine = 'train.py' if args.train_py else 'resident'
    runs = {
        run: Path(args.output, run.name).absolute()
        for seed in dict.fromkeys(args.seeds)
        for row in _choose(args.table, args.models)
        for run in [Run(row, args.dataset, args.schedule, seed, engine, recipe, counts)]
    }
    for file in (results, *(folder / 'last.pth.tar' for folder in runs.values())):
        check_writable(file)
    known = read_results(results)
    todo = [run for run in runs if not run.has_result(known)]
    print(f'{len(runs) - len(todo)} of {len(runs)} runs were done before', flush=True)
    if not todo:
        return

    gpu = device.type == 'cuda'
    versions = {
        'device': torch.cuda.get_device_name(device) if gpu else 'cpu',
        'timm_regnet_reg': __version__,
        'timm': timm.__version__,
        'torch': str(torch.__version__),  # a class of its own, which checkpoints don't take
        'python': platform.python_version(),
    }
    script = [os.path.abspath(args.train_py)] if args.train_py else []
    script += ['--data-dir', os.path.abspath(args.data_dir), '--device', str(device)]
    script += ['--torchcompile', 'inductor'] if args.compile else []
    script += [] if gpu else ['--workers', '0']  # a CPU has no time for processes that wait for it
    images = None if args.train_py else resident.read_images(args.data_dir, classes, device)
    at_once = AT_ONCE if gpu and images else 1
    failed: List[str] = []

    def fail(run: Run, error: Exception) -> None:
        failed.append(f'{run}: {reason(error)}')
        print(failed[-1], file=sys.stderr, flush=True)

    number = len(todo)
    while todo and time.monotonic() < stop:
        group, todo = todo[:at_once], todo[at_once:]
        with ExitStack() as claims:
            claimed = {}
            for run in group:
                try:
                    claims.enter_context(locked(runs[run], seconds=0))
                    if not run.has_result(read_results(results)):  # which another process may have added
                        claimed[run] = runs[run]
                except TROUBLE as error:
                    fail(run, error)
            if images:
                outcomes = resident.train(claimed, images, versions, stop, args.compile)
            else:
                outcomes = _by_script(claimed, path, script)
            for run, outcome in outcomes:
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    add_result(
                        results, {**_facts(run), 'options': shlex.join(_options(run, path)), **versions, **outcome}
                    )
                    print(f'{run}: done, top-1 {outcome["top1"]:.2f} %', flush=True)
                except TROUBLE as error:
                    fail(run, error)
    if failed:
        raise UserError(f'{len(failed)} of {number} runs are not done:\n' + '\n'.join(failed))
    if time.monotonic() >= stop:
        print('Stopped in time; the same command goes on with what is not done.')


def _facts(run: Run) -> Dict[str, Any]:
    """The columns of a run's row that no training measures."""
    model = timm.create_model(run.row.model, num_classes=run.classes, device='meta', **run.row.kwargs).eval()
    parameters, multiply_adds = count(model, torch.empty(1, 3, 32, 32, device='meta'))
    return {**run.identity, 'parameters': parameters, 'multiply_adds': multiply_adds}


def _by_script(
    runs: Dict[Run, Path], recipe: Path, script: List[str]
) -> Iterator[Tuple[Run, Union[Dict[str, Any], Exception]]]:
    for run, folder in runs.items():
        try:
            yield run, train_by_script(run, folder, [*script, *_options(run, recipe.absolute())])
        except TROUBLE as error:
            yield run, error
