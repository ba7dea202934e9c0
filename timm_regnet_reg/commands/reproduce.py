"""Train the papers' CIFAR tables, and report the results beside theirs.

    regnet-reg cifar DIR
    regnet-reg reproduce --data-dir DIR
    regnet-reg reproduce --data-dir DIR --device cuda --amp --compile --seeds 0 1 2 3 4
    regnet-reg reproduce path/to/train.py --data-dir DIR
    regnet-reg reproduce --report

Start this in a clone of this project, where train_recipes/ is. Tables: resnet20 (the plain network and three cells),
seresnet20 (the same with Squeeze-and-Excitation), stages (one regulated stage), depth (32 and 56 layers). A schedule is
a recipe: papers is train_recipes/{dataset}.yaml (164 epochs), short (30 epochs) and strong (200 epochs) are
{dataset}_{schedule}.yaml.

All images lie on the device and a GPU trains several networks at once, each update in a CUDA graph. A CPU trains one
after the other; start the command twice, each with OMP_NUM_THREADS=1, to train two at a time on two cores: each takes
the runs that the other has not. With TRAIN_PY, the path of train.py in a clone of timm's repository
(github.com/huggingface/pytorch-image-models), that script trains instead, a process for each run.

Stop it whenever you like and start it again: what is done is skipped, and what was begun goes on. The engine saves each
run every 30 seconds and goes on where it was, on another device too; train.py goes on after the last complete epoch
(with other random numbers: its own start at the seed again, so that they get seed + 1000 * epochs done). A train.py
whose command was killed by force may still be running: end it before you start again. Logs and checkpoints are in a
folder for each run in --output; `regnet-reg package` takes these checkpoints.

A run adds a row to {dataset}.csv in --results: accuracy of the last epoch, not the best, on all images of validation/,
in the precision it trains in. --report reads that file alone: it prints the error, mean and standard deviation over
seeds, beside the papers', and draws it over the parameters in {dataset}.png. Engines make tables of their own.
"""

import argparse
import csv
import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import timm
import torch
import yaml
from PIL import Image

from .. import __version__
from ..arguments import count as whole_number
from ..arguments import positive
from ..errors import UserError, reason
from ..papers import resident
from ..papers.flops import count
from ..papers.plots import plot_folder
from ..papers.results import TABLES, Row, Run, add_result, draw, find_result, read_results, report
from ..weights.files import check_writable, locked, replacing

# what may be the matter with one run, its folder and its files; other runs go on
TROUBLE = (UserError, OSError, ValueError, csv.Error)


def check_data(data_dir: str, dataset: str) -> Dict[str, int]:
    """The number of images in each split.

    Raises:
        UserError: These are not the folders that `regnet-reg cifar` writes.
    """
    images = {}
    for split, size in (('train', 40), ('validation', 32)):
        root = Path(data_dir, split)
        files = sorted(root.glob('*/*.png')) if os.path.isdir(root) else []  # glob fails on a name that is too long
        classes = len({file.parent.name for file in files})
        if classes != int(dataset.removeprefix('cifar')):
            found = f'holds PNG images of {classes} classes'
        elif (found_size := _image_size(files[0])) != f'{size}x{size}':
            found = f'holds images of {found_size}, expected {size}x{size}'
        else:
            images[split] = len(files)
            continue
        raise UserError(f'{root}: {found}; write the folder with `regnet-reg cifar DIR --dataset {dataset}`')
    return images


def _image_size(path: Path) -> str:
    try:
        with Image.open(path) as image:
            return '{}x{}'.format(*image.size)
    except Exception as error:  # decoders raise whatever they stumble over in a damaged file
        raise UserError(f'{path}: cannot be read as an image ({reason(error)}); get it again') from error


def read_recipe(dataset: str, schedule: str) -> Dict[str, Any]:
    """The recipe of a schedule.

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
    return recipe


def newest_checkpoint(folder: Path) -> Tuple[Optional[Path], int]:
    """The latest checkpoint of train.py that can be loaded, and the number of epochs that it has seen; (None, 0)
    without one.

    Raises:
        UserError: There are checkpoints, but none can be loaded.
    """
    newest: Tuple[Optional[Path], int] = (None, 0)
    failed = ''
    for path in sorted(folder.glob('*.pth.tar')):
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):  # train.py's own arguments
                epochs = torch.load(path, map_location='cpu', weights_only=True)['epoch'] + 1
        except Exception as error:  # half-written, as its process was killed; an older one will do
            if not path.name.startswith('tmp'):  # what train.py writes before it renames it
                failed = f'{path}: cannot be loaded ({reason(error)}), and nor can another checkpoint of the run'
            continue
        if epochs > newest[1]:
            newest = path, epochs
    if failed and newest[0] is None:
        raise UserError(f'{failed}; restore one, or remove the folder to start over')
    return newest


def read_summary(folder: Path) -> Dict[int, Dict[str, float]]:
    """The figures of train.py's summary.csv by epoch. What a resumed run writes again replaces what it wrote before."""
    path = folder / 'summary.csv'
    epochs = {}
    if path.exists():
        with open(path, newline='') as file:
            for line in csv.DictReader(file):
                try:
                    figures = {key: float(value) for key, value in line.items()}
                except (TypeError, ValueError):  # the header of a resumed run, or half a line of one that was killed
                    continue
                epochs[int(figures['epoch'])] = figures
    return epochs


def train_by_script(
    run: Run, folder: Path, train_py: str, data_dir: str, device: str, compiled: bool
) -> Dict[str, Any]:
    """Train a run by train.py, from the start or after its last complete epoch, and return what it measured.

    Raises:
        UserError: The folder's run has other settings or no readable checkpoint, train.py failed, or the run diverged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / 'settings.json'
    checkpoint, done = newest_checkpoint(folder)
    if checkpoint or settings.exists():
        try:
            begun = json.loads(settings.read_text(encoding='utf-8'))
        except (OSError, ValueError):  # missing or damaged
            begun = None
        if begun != run.facts:
            raise UserError(
                f'{folder}: was begun with other settings, see settings.json in it. Give another --output, or remove '
                'the folder to start over'
            )
    with replacing(settings) as new:
        new.write_text(json.dumps(run.facts, indent=1), encoding='utf-8')
    recipe = folder / 'recipe.yaml'  # what the run was begun with, whatever becomes of the original
    with replacing(recipe) as new:
        new.write_text(yaml.safe_dump(run.recipe), encoding='utf-8')
    command = [sys.executable, '-m', 'timm_regnet_reg', 'run', os.path.abspath(train_py)]  # `run`: not the clone's timm
    command += ['--config', str(recipe), '--model', run.row.model, '--device', device, '--checkpoint-hist', '1']
    command += ['--model-kwargs', *run.row.arguments.split()] if run.row.arguments else []
    command += ['--workers', '0'] if device == 'cpu' else []  # its cores have no time for processes that wait
    command += ['--torchcompile', 'inductor'] if compiled else []
    command += ['--data-dir', os.path.abspath(data_dir), '--output', str(folder.parent), '--experiment', folder.name]
    command += ['--seed', str(run.seed + 1000 * done)] + (['--resume', str(checkpoint)] if checkpoint else [])
    log = folder / 'log.txt'
    print(f'{run}: {f"goes on after epoch {done}" if done else "starts"}; {log} tells how it goes on', flush=True)
    start, code = time.monotonic(), 0
    if done < run.recipe['epochs']:
        with open(log, 'ab') as file:
            code = subprocess.run(
                command,
                cwd=Path(__file__).parents[2],  # where -m looks first: for this package, and not a clone's
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode
    last = read_summary(folder).get(run.recipe['epochs'] - 1)
    if last is None or newest_checkpoint(folder)[1] < run.recipe['epochs']:
        end = '\n  '.join(log.read_text(errors='replace').splitlines()[-5:]) if log.exists() else ''
        raise UserError(f'train.py ended with code {code}; the end of {log}:\n  {end}')
    if not math.isfinite(last['train_loss']):
        raise UserError(
            f'the training diverged (loss {last["train_loss"]} in the last epoch), and makes no row; see {folder}, and '
            'remove it to start over'
        )
    return {
        'top1': last['eval_top1'],
        'top5': last['eval_top5'],
        'train_loss': last['train_loss'],
        'seconds': '' if done else round(time.monotonic() - start),  # of how many processes isn't known
    }


def _choose(tables: List[str], models: Optional[List[str]]) -> List[Row]:
    rows = list(dict.fromkeys(row for table in tables for row in TABLES[table]))
    if models is None:
        return rows
    known = {name for row in rows for name in (row.model, str(row))}
    if unknown := [model for model in models if model not in known]:
        raise UserError(
            f'--models {" ".join(unknown)}: not in --table {" ".join(tables)}, which has {", ".join(sorted(known))}'
        )
    return [row for row in rows if row.model in models or str(row) in models]


def _choose_device(name: Optional[str]) -> torch.device:
    try:
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.empty(1, device=device)
    except Exception as error:  # every backend has its own
        raise UserError(f'--device {name}: cannot be used ({str(error).partition(chr(10))[0]}); give cpu') from error
    if device.type not in ('cpu', 'cuda'):
        raise UserError(f'--device {name}: expected cpu or cuda')
    return device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('train_py', metavar='TRAIN_PY', nargs='?', help="path of timm's train.py, if it shall train")
    parser.add_argument('--data-dir', metavar='DIR', help='the folder that `regnet-reg cifar` wrote')
    parser.add_argument('--dataset', choices=['cifar10', 'cifar100'], default='cifar10', help='default: cifar10')
    parser.add_argument('--table', nargs='+', choices=[*TABLES], default=['resnet20'], help='default: resnet20')
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='MODEL',
        help="only these of the tables, one row by 'MODEL ARGUMENTS' in quotes (default: all)",
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
    parser.add_argument('--compile', action='store_true', help='compile the networks: minutes at the start')
    parser.add_argument('--device', help='default: cuda if there is one, else cpu')
    parser.add_argument(
        '--at-once', type=positive, metavar='N', help='networks at once without TRAIN_PY (default: 4; on a CPU 1)'
    )
    parser.add_argument('--minutes', type=positive, metavar='M', help='stop in time, to go on later')
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
    if args.train_py and not os.path.isfile(args.train_py):
        raise UserError(f"{args.train_py}: no such file; expected train.py of a clone of timm's repository")
    if args.train_py and args.minutes:
        raise UserError('--minutes: train.py cannot stop by itself; leave TRAIN_PY or --minutes out')
    recipe = read_recipe(args.dataset, args.schedule)
    if args.amp:
        recipe.update(amp=True, amp_dtype='bfloat16')
    if not args.train_py:
        resident.check_recipe(recipe)
    device = _choose_device(args.device)
    counts = check_data(args.data_dir, args.dataset)
    engine = 'train.py' if args.train_py else 'resident'
    runs = [
        Run(row, args.dataset, args.schedule, seed, engine, recipe, counts)
        for seed in dict.fromkeys(args.seeds)
        for row in _choose(args.table, args.models)
    ]
    folders = {run: Path(args.output, run.name).absolute() for run in runs}
    for path in (results, *(folder / 'settings.json' for folder in folders.values())):
        check_writable(path)
    known = read_results(results)
    todo = [run for run in runs if not find_result(run, known)]
    print(f'{len(runs) - len(todo)} of {len(runs)} runs were done before', flush=True)
    if not todo:
        return

    device_name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    versions = {
        'device': device_name,
        'timm_regnet_reg': __version__,
        'timm': timm.__version__,
        'torch': torch.__version__,
        'python': platform.python_version(),
    }
    failed: List[str] = []

    def fail(run: Run, error: Exception) -> None:
        failed.append(f'{run}: {reason(error)}')
        print(failed[-1], file=sys.stderr, flush=True)

    images = None if args.train_py else resident.read_images(args.data_dir).to(device)
    at_once = 1 if args.train_py else args.at_once or (4 if device.type == 'cuda' else 1)
    for first in range(0, len(todo), at_once):
        if time.monotonic() >= stop:
            break
        with ExitStack() as claims:
            group = []
            for run in todo[first : first + at_once]:
                try:
                    claims.enter_context(locked(folders[run], seconds=0))
                    if not find_result(run, read_results(results)):  # another process may have trained it meanwhile
                        group.append(run)
                except TROUBLE as error:
                    fail(run, error)
            if images is not None:
                outcomes = resident.train(group, images, folders, versions, stop, args.compile)
            else:
                outcomes = _by_script(group, folders, args, device.type, versions)
            for run, outcome in outcomes:
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    add_result(results, {**_result(run), **outcome})
                except TROUBLE as error:
                    fail(run, error)
                else:
                    print(f'{run}: done, top-1 {outcome["top1"]:.2f} %', flush=True)
    if failed:
        raise UserError(f'{len(failed)} of {len(todo)} runs are not done:\n' + '\n'.join(failed))
    if time.monotonic() >= stop:
        print('stopped in time; the same command goes on with what is not done')


def _by_script(
    runs: List[Run], folders: Dict[Run, Path], args: argparse.Namespace, device: str, versions: Dict[str, str]
) -> Iterator[Tuple[Run, Union[Dict[str, Any], Exception]]]:
    for run in runs:
        try:
            figures = train_by_script(run, folders[run], args.train_py, args.data_dir, device, args.compile)
            yield run, {**figures, **versions}
        except TROUBLE as error:
            yield run, error


def _result(run: Run) -> Dict[str, Any]:
    """The columns of a run's row that no training measures."""
    model = timm.create_model(run.row.model, num_classes=run.classes, device='meta', **run.row.kwargs).eval()
    parameters, multiply_adds = count(model, torch.empty(1, 3, 32, 32, device='meta'))
    schedule = '' if run.schedule == 'papers' else f'_{run.schedule}'
    options = [f'--config train_recipes/{run.dataset}{schedule}.yaml']
    options += ['--amp --amp-dtype bfloat16'] if run.precision == 'bf16' else []
    options += [f'--model {run.row.model}', *([f'--model-kwargs {run.row.arguments}'] if run.row.arguments else [])]
    return {
        **run.facts,
        'parameters': parameters,
        'multiply_adds': multiply_adds,
        'options': ' '.join([*options, f'--seed {run.seed}']),
    }
