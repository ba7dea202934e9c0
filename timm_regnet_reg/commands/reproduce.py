"""Train the papers' CIFAR tables with train.py, and report the results beside theirs.

    regnet-reg cifar DIR
    regnet-reg reproduce TRAIN_PY --data-dir DIR --jobs 2
    regnet-reg reproduce --report

TRAIN_PY is the path of train.py in a clone of timm's repository (github.com/huggingface/pytorch-image-models). Start
this in a clone of this project, where train_recipes/ is. Tables: resnet20 (the plain network and three cells),
seresnet20 (the same with Squeeze-and-Excitation), stages (one regulated stage), depth (32 and 56 layers). Schedules:
papers (164 epochs, the recipe as it is) and short (30 epochs, cosine, Nesterov, weight decay 5e-4). All networks of a
schedule are trained alike, with the options of train.py that the last column of the results lists.

Stop it whenever you like and start it again: a run that is done is skipped, one that was begun goes on after its last
complete epoch (with other random numbers: train.py's start at the seed again, so that they get seed + 1000 * epochs
done), and one that was begun with other settings, or with another version of this package, timm or torch, is refused.
Each run is a process of low priority, which stops when this one does; its log and checkpoints are in a folder of its
own in --output.

A run adds a row to {dataset}.csv in --results: accuracy of the last epoch, not the best, on all images of validation/,
as train.py measures it in the precision it trains in. --report reads that file alone: it prints the error, mean and
standard deviation over seeds, beside the papers', and draws it over the parameters in {dataset}.png.
"""

import argparse
import csv
import ctypes
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
import yaml
from PIL import Image

from .. import __version__
from ..arguments import count as whole_number
from ..arguments import positive
from ..errors import UserError, reason
from ..papers.flops import count
from ..papers.plots import plot_folder
from ..papers.results import IDENTITY, TABLES, Row, add_result, draw, read_results, report
from ..weights.files import check_writable, lock_folder, replacing

# a process that was killed, and what it started, may take that long to end
LOCK_SECONDS = 10

# what may be the matter with one run, its folder and its files; other runs go on
TROUBLE = (UserError, OSError, ValueError, csv.Error)


# options of train.py beyond the recipe's
SCHEDULES: Dict[str, Dict[str, Any]] = {
    'papers': {},
    'short': {
        'epochs': 30,
        'sched': 'cosine',
        'min-lr': 0,
        'warmup-epochs': 1,
        'warmup-lr': 0.01,
        'opt': 'sgd',  # with Nesterov's momentum
        'weight-decay': 5e-4,
    },
}
PRECISIONS = {'bf16': ['--amp', '--amp-dtype', 'bfloat16', '--torchcompile', 'inductor'], 'float32': []}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def common_options(dataset: str, schedule: str, precision: str, device: str) -> List[str]:
    """What train.py is given for all runs that are compared."""
    return [
        *('--config', f'train_recipes/{dataset}.yaml'),
        *(word for key, value in SCHEDULES[schedule].items() for word in (f'--{key}', str(value))),
        *PRECISIONS[precision],
        *('--device', device, '--checkpoint-hist', '1'),
        # a run's one core has no time for processes that wait for it
        *(['--workers', '0'] if device == 'cpu' else []),
    ]


def run_options(row: Row, seed: int) -> List[str]:
    """What train.py is given for one of them."""
    kwargs = ['--model-kwargs', *row.arguments.split()] if row.arguments else []
    return ['--model', row.model, *kwargs, '--seed', str(seed)]


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


def _read_recipe(path: Path) -> Dict[str, Any]:
    if not path.is_file():
        raise UserError(f'{path}: no such file; start this in a clone of this project')
    try:
        recipe = yaml.safe_load(path.read_text(encoding='utf-8'))
        if not isinstance(recipe, dict) or not isinstance(recipe.get('epochs'), int):
            raise ValueError('it gives no number of epochs')
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{path}: cannot be read as a recipe ({" ".join(str(error).split())}); restore it') from error
    return recipe


def newest_checkpoint(folder: Path) -> Tuple[Optional[Path], int]:
    """The latest checkpoint that can be loaded, and the number of epochs that it has seen; (None, 0) without one.

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


def keep_summary(folder: Path, epochs: int) -> None:
    """Keep of train.py's summary.csv what is about the first `epochs` epochs: those that are in the checkpoint."""
    kept = [figures for epoch, figures in read_summary(folder).items() if epoch < epochs]
    with replacing(folder / 'summary.csv') as new, open(new, 'w', newline='') as file:
        if kept:  # train.py writes its header anew
            writer = csv.DictWriter(file, kept[0])
            writer.writeheader()
            writer.writerows(kept)


def _read_settings(path: Path) -> Dict[str, Any]:
    """What a run was begun with; nothing if that isn't known."""
    try:
        settings = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):  # missing or damaged
        return {}
    return settings if isinstance(settings, dict) else {}


class Run:
    """One training of a row: its settings, its folder, and its process while there is one."""

    def __init__(self, row: Row, seed: int, args: argparse.Namespace, recipe: Dict[str, Any], images: Dict[str, int]):
        self.row, self.seed = row, seed
        precision = 'float32' if args.float32 else 'bf16'
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        common = common_options(args.dataset, args.schedule, precision, device)
        self.options = [*common, *run_options(row, seed)]
        self.epochs = SCHEDULES[args.schedule].get('epochs', recipe['epochs'])
        settings = {'options': self.options, 'recipe': recipe, 'images': images}
        self.versions = {'timm_regnet_reg': __version__, 'timm': timm.__version__, 'torch': torch.__version__}
        self.settings = {**settings, **self.versions}
        self.facts = {
            'model': row.model,
            'arguments': row.arguments,
            'dataset': args.dataset,
            'schedule': args.schedule,
            'precision': precision,
            'seed': str(seed),
            'images': str(images['validation']),
            'epochs': self.epochs,
            'device': device,
            'recipe': _digest(recipe),
            'settings': _digest({**settings, 'options': common}),
            'options': ' '.join(self.options),
        }
        stages = ''.join(f'-stage{i}' for i in row.kwargs.get('regulated_stages', ()))
        name = f'{args.dataset}-{args.schedule}-{precision}-{row.model}{stages}-seed{seed}'
        self.folder = Path(args.output, name).absolute()
        self.done = 0  # epochs
        self.seconds = 0.0  # of them

    def __str__(self) -> str:
        return f'{self.row}, seed {self.seed}'

    def check(self, results: List[Dict[str, str]]) -> bool:
        """Whether the run is among the results.

        Raises:
            UserError: It is, or was begun, with other settings.
        """
        for result in results:
            if all(result[key] == self.facts[key] for key in IDENTITY):
                if result['settings'] != self.facts['settings']:
                    told = [key for key in ('options', 'recipe') if result[key] != self.facts[key]]
                    raise UserError(
                        f'{self}: has a result that was trained with other settings '
                        f'({", ".join(told) or "the number of training images"}). Give another --results, or remove '
                        'its row'
                    )
                return True
        file = self.folder / 'settings.json'
        if file.exists() or any(self.folder.glob('*.pth.tar')):
            begun = _read_settings(file)
            if begun != self.settings:
                differ = [key for key in self.settings if begun.get(key) != self.settings[key]]
                raise UserError(
                    f'{self.folder}: was begun with other settings ({", ".join(differ)}; see settings.json in it). '
                    'Give another --output, or remove the folder to start over'
                )
        return False

    def start(self, train_py: str, data_dir: str, threads: int, results: Path) -> bool:
        """Start training, or go on after the last complete epoch; False if it has come to be among the results.

        Raises:
            UserError: Another process trains this run, or has begun it with other settings, or no checkpoint of it can
                be loaded.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(self.folder, LOCK_SECONDS)
        started = False
        try:
            if self.check(read_results(results)):
                return False
            recipe = self.folder / 'recipe.yaml'  # what the settings say, whatever becomes of the original
            with replacing(recipe) as new:
                new.write_text(yaml.safe_dump(self.settings['recipe']), encoding='utf-8')
            with replacing(self.folder / 'settings.json') as new:
                new.write_text(json.dumps(self.settings, indent=1), encoding='utf-8')
            checkpoint, self.done = newest_checkpoint(self.folder)
            clock = self.folder / 'seconds'
            if checkpoint:
                self.seconds = float(clock.read_text()) if clock.exists() else 0.0
                # train.py seeds anew: with the same seed the epochs after every stop would be the first ones' again
                resume = ['--resume', str(checkpoint), '--seed', str(self.seed + 1000 * self.done)]
            else:
                resume = []
            keep_summary(self.folder, self.done)
            self.start_seconds, self.started = self.seconds, time.monotonic()
            environment = {
                **os.environ,
                'OMP_NUM_THREADS': str(threads),
                # compiled for CPUs, tanh by exp takes half as long as the function of the C library
                'TORCHINDUCTOR_CPP_USE_DECOMPOSE_TANH': '1',
            }
            if sys.platform == 'linux':  # keep freed memory: asking for it again costs more than some layers do
                environment['GLIBC_TUNABLES'] = (
                    'glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592'
                )
            libc = ctypes.CDLL(None)

            def in_child() -> None:
                os.nice(19)
                if sys.platform == 'linux':
                    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with this process, however that ends
                    # where Linux shares its time out by sessions, niceness is worth nothing outside one's own
                    with suppress(OSError), open('/proc/self/autogroup', 'w') as group:
                        group.write('19')

            places = ['--config', str(recipe), '--data-dir', os.path.abspath(data_dir)]
            places += ['--output', str(self.folder.parent), '--experiment', self.folder.name]
            with open(self.folder / 'log.txt', 'ab') as log:
                self.process = subprocess.Popen(
                    # `run`, for a train.py in a clone would take the clone's timm
                    [sys.executable, '-m', 'timm_regnet_reg', 'run', os.path.abspath(train_py)]
                    + [*self.options, *places, *resume],
                    cwd=Path(__file__).parents[2],  # where -m looks first: for this package, and not a clone's
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    preexec_fn=in_child,
                    start_new_session=True,  # Ctrl-C is for this process; train.py would end with success
                    pass_fds=[self.lock],
                )
            started = True
        finally:
            if not started:
                os.close(self.lock)
        return started

    def progress(self) -> Optional[Dict[str, float]]:
        """The figures of the last epoch, if it is a new one."""
        summary = read_summary(self.folder)
        done = max(summary, default=-1) + 1
        if done <= self.done:
            return None
        self.done = done
        self.seconds = self.start_seconds + time.monotonic() - self.started
        with replacing(self.folder / 'seconds') as new:
            new.write_text(f'{self.seconds:.0f}')
        return summary[self.done - 1]

    def stop(self) -> None:
        """End the process, if it hasn't, and leave the folder to others."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.lock)

    def finish(self, results: Path) -> None:
        """Add the row of a run whose process has ended to the results.

        Raises:
            UserError: train.py failed, the training diverged, or the row can't be added.
        """
        if self.process.returncode != 0 or self.epochs - 1 not in read_summary(self.folder):
            log = self.folder / 'log.txt'
            end = '\n  '.join(log.read_text(errors='replace').splitlines()[-5:]) if log.exists() else ''
            raise UserError(f'train.py ended with code {self.process.returncode}; the end of {log}:\n  {end}')
        add_result(results, self.result())

    def result(self) -> Dict[str, Any]:
        """The row of a run that is through.

        Raises:
            UserError: The training diverged.
        """
        last = read_summary(self.folder)[self.epochs - 1]
        if not math.isfinite(last['train_loss']):
            raise UserError(
                f'the training diverged (loss {last["train_loss"]} in the last epoch), and makes no row; see '
                f'{self.folder}, and remove it to start over'
            )
        classes = int(self.facts['dataset'].removeprefix('cifar'))
        model = timm.create_model(self.row.model, num_classes=classes, device='meta', **self.row.kwargs).eval()
        parameters, multiply_adds = count(model, torch.empty(1, 3, 32, 32, device='meta'))
        return {
            **self.facts,
            'top1': round(last['eval_top1'], 3),
            'top5': round(last['eval_top5'], 3),
            'train_loss': round(last['train_loss'], 5),
            'parameters': parameters,
            'multiply_adds': multiply_adds,
            'seconds': round(self.seconds),
            'python': platform.python_version(),
            **self.versions,
        }


def _time_left(todo: List[Run], runs: List[Run], jobs: int) -> str:
    """By the pace of each network in `runs`, of others by the mean; a run has one process, however many could run."""
    paces: Dict[str, List[float]] = {}
    for run in runs:
        if run.done and run.seconds:
            paces.setdefault(run.row.model, []).append(run.seconds / run.done)
    if not paces:
        return ''
    mean = {model: statistics.mean(pace) for model, pace in paces.items()}
    other = statistics.mean(mean.values())
    left = [(run.epochs - run.done) * mean.get(run.row.model, other) for run in todo]
    seconds = max([sum(left) / jobs, *left])
    return f'; about {seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min left'


def train(runs: List[Run], results: Path, train_py: str, data_dir: str, jobs: int) -> List[str]:
    """Trains the runs in their order, `jobs` at a time, and adds their results to a CSV file.

    Returns:
        What went wrong, a message a run.
    """
    waiting = list(runs)
    running: List[Run] = []
    failed: List[str] = []
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def fail(run: Run, error: Exception) -> None:
        failed.append(f'{run}: {reason(error)}')
        print(failed[-1], file=sys.stderr, flush=True)

    try:
        while waiting or running:
            if waiting and len(running) < jobs:  # one a second, as often as Linux lets a niceness be set
                run = waiting.pop(0)
                try:
                    if not run.start(train_py, data_dir, threads, results):
                        continue
                except TROUBLE as error:
                    fail(run, error)
                    continue
                running.append(run)
                print(f'{run}: {f"goes on after epoch {run.done}" if run.done else "starts"}', flush=True)
            time.sleep(1)
            for run in list(running):
                code = run.process.poll()
                try:
                    if figures := run.progress():
                        print(
                            f'{run}: epoch {run.done} of {run.epochs}, top-1 {figures["eval_top1"]:.2f} %, train loss '
                            f'{figures["train_loss"]:.3f} ({len(runs) - len(waiting) - len(running) - len(failed)} of '
                            f'{len(runs)} runs done{_time_left(waiting + running, runs, jobs)})',
                            flush=True,
                        )
                    if code is None:
                        continue
                    run.finish(results)
                    print(f'{run}: done, in {results}', flush=True)
                except TROUBLE as error:
                    fail(run, error)
                running.remove(run)
                run.stop()
    finally:
        for run in running:
            run.stop()
    return failed


def _choose(tables: List[str], models: Optional[List[str]]) -> List[Row]:
    rows = [row for table in dict.fromkeys(tables) for row in TABLES[table]]
    if models is None:
        return rows
    known = {row.model for row in rows}
    if unknown := [model for model in models if model not in known]:
        raise UserError(
            f'--models {" ".join(unknown)}: not in --table {" ".join(tables)}, which has {", ".join(sorted(known))}'
        )
    return [row for row in rows if row.model in models]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('train_py', metavar='TRAIN_PY', nargs='?', help="path of timm's train.py")
    parser.add_argument('--data-dir', metavar='DIR', help='the folder that `regnet-reg cifar` wrote')
    parser.add_argument('--dataset', choices=['cifar10', 'cifar100'], default='cifar10', help='default: cifar10')
    parser.add_argument(
        '--table',
        nargs='+',
        choices=['resnet20', 'seresnet20', 'stages', 'depth'],
        default=['resnet20'],
        help='default: resnet20',
    )
    parser.add_argument('--models', nargs='+', metavar='MODEL', help='only these of the tables (default: all)')
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=whole_number,
        default=[0],
        metavar='N',
        help='default: 0; all models are trained with one before the next',
    )
    parser.add_argument('--schedule', choices=['short', 'papers'], default='short', help='default: short')
    parser.add_argument(
        '--float32', action='store_true', help='train in float32, not compiled, instead of compiled in bfloat16'
    )
    parser.add_argument('--jobs', type=positive, default=1, metavar='N', help='runs at a time (default: 1)')
    parser.add_argument('--output', default='runs', metavar='DIR', help='for logs and checkpoints (default: ./runs)')
    parser.add_argument(
        '--results', default='train_recipes/results', metavar='DIR', help='for the CSV files (default: %(default)s)'
    )
    parser.add_argument('--report', action='store_true', help='print and draw all results of --dataset instead')


def main(args: argparse.Namespace) -> None:
    """Train what is missing, or report what is there.

    Raises:
        UserError: Something is missing, a run was begun with other settings, or train.py failed in one.
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

    if not args.train_py or not args.data_dir:
        raise UserError('TRAIN_PY and --data-dir are needed to train; --report alone needs neither')
    if not os.path.isfile(args.train_py):
        raise UserError(f"{args.train_py}: no such file; expected train.py of a clone of timm's repository")
    recipe = _read_recipe(Path('train_recipes', f'{args.dataset}.yaml'))
    images = check_data(args.data_dir, args.dataset)
    rows = _choose(args.table, args.models)
    runs = [Run(row, seed, args, recipe, images) for seed in dict.fromkeys(args.seeds) for row in rows]
    for path in (results, *(run.folder / 'settings.json' for run in runs)):
        check_writable(path)
    known = read_results(results)
    todo = [run for run in runs if not run.check(known)]
    print(f'{len(runs) - len(todo)} of {len(runs)} runs were done before', flush=True)
    if failed := train(todo, results, os.path.abspath(args.train_py), args.data_dir, args.jobs):
        raise UserError(f'{len(failed)} of {len(todo)} runs failed:\n' + '\n'.join(failed))
