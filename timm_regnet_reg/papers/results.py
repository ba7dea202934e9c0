"""The rows of the papers' CIFAR tables, runs of them, the CSV files of what was trained, and what these tell."""

import argparse
import csv
import hashlib
import json
import math
import re
import shlex
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs

from ..errors import UserError
from ..weights.files import locked, replacing
from . import output
from .cifar import CLASSES

Result = Dict[str, str]  # a row of a CSV file


class Row(NamedTuple):
    """A row of a table: a model, its arguments as --model-kwargs takes them, and the papers' errors in %, if any."""

    model: str
    arguments: str
    cifar10: str = ''
    cifar100: str = ''

    @property
    def kwargs(self) -> Dict[str, Any]:
        parsed = argparse.Namespace()
        ParseKwargs([], 'kwargs')(argparse.ArgumentParser(), parsed, shlex.split(self.arguments))
        return parsed.kwargs

    def __str__(self) -> str:
        return f'{self.model} {self.arguments}'.strip()


TABLES: Dict[str, List[Row]] = {}
for line in csv.DictReader(Path(__file__).with_name('tables.csv').read_text().splitlines()):
    TABLES.setdefault(line.pop('table'), []).append(Row(**line))
ROWS = [row for rows in TABLES.values() for row in rows]
PLACES = {(row.model, row.arguments): place for place, row in enumerate(ROWS)}
# what a run is known by; it may have one row
IDENTITY = ['model', 'arguments', 'dataset', 'schedule', 'engine', 'precision', 'images', 'seed', 'epochs', 'settings']
MEASURED = ['top1', 'top5', 'train_loss', 'parameters', 'multiply_adds', 'seconds']
VERSIONS = ['device', 'timm_regnet_reg', 'timm', 'torch', 'python']
COLUMNS = IDENTITY + MEASURED + VERSIONS + ['options']
# what rows must have in common for a mean or a table
ALIKE = ['dataset', 'schedule', 'epochs', 'engine', 'precision', 'images', 'settings']
TITLE = (
    '{dataset}, schedule {schedule}, {epochs} epochs, {precision}, by {engine}, {images:,} images, settings {settings}'
)


def scheduled_epochs(options: Dict[str, Any]) -> int:
    """How many epochs train.py trains with these options: warm-up before the schedule and cooldown come on top."""
    kwargs = scheduler_kwargs(argparse.Namespace(**{'sched': 'cosine', **options}))
    return create_scheduler_v2(torch.optim.SGD([torch.zeros(1)], lr=1.0), **kwargs, updates_per_epoch=1)[1]


def find_row(model: str, arguments: str) -> Row:
    """The row of the tables or, of a network that is in none, one without papers' errors."""
    return ROWS[PLACES[model, arguments]] if (model, arguments) in PLACES else Row(model, arguments)


@dataclass(frozen=True, eq=False)
class Run:
    """One training of a row, by all that decides its result."""

    row: Row
    dataset: str  # 'cifar10' or 'cifar100'
    schedule: str  # the name of the recipe among the data set's
    seed: int  # of the weights, the order of the images and their views
    engine: str  # 'resident' or 'train.py'
    recipe: Dict[str, Any]  # its options, and those of the precision
    images: Dict[str, Any]  # how many are in train/ and validation/, and their digest

    def __str__(self) -> str:
        return f'{self.row}, seed {self.seed}'

    @property
    def amp_dtype(self) -> str:
        """Of the automatic mixed precision, with train.py's default; '' without it."""
        return (self.recipe.get('amp_dtype') or 'float16') if self.recipe.get('amp') else ''

    @cached_property
    def identity(self) -> Dict[str, str]:
        """The columns `IDENTITY`; `settings` is a digest of what the runs of a table are given alike."""
        settings = json.dumps([self.recipe, self.images], sort_keys=True).encode()
        values = {**vars(self), 'model': self.row.model, 'arguments': self.row.arguments}
        values.update(images=self.images['validation'], epochs=scheduled_epochs(self.recipe))
        precision = self.amp_dtype or self.recipe.get('model_dtype') or 'float32'
        values['precision'] = 'bf16' if precision == 'bfloat16' else precision
        values['settings'] = hashlib.sha256(settings).hexdigest()[:12]
        return {key: str(values[key]) for key in IDENTITY}

    @property
    def name(self) -> str:
        """Of the run's folder."""
        # 'stage(3,)' becomes 'stage3'; '.', ',' and '-' stay, by which numbers differ
        arguments = re.sub(r'[^\w.,-]|,(?=\))', '', self.row.arguments.replace('regulated_stages', 'stage'))
        facts = {**self.identity, 'arguments': arguments}
        names = (facts[key] for key in ('dataset', 'schedule', 'engine', 'precision', 'model', 'arguments'))
        return f'{"-".join(filter(None, names))}-seed{self.seed}-{facts["settings"]}'

    def has_result(self, results: List[Result]) -> bool:
        return any(self.identity.items() <= result.items() for result in results)


def _check(results: List[Result]) -> None:
    """Raises a ValueError if these can't be what `add_result` wrote."""
    for line, result in enumerate(results, start=2):
        if {*result} != {*COLUMNS} or None in result.values():
            raise ValueError(f'line {line} has not the columns {", ".join(COLUMNS)}')
        if result['dataset'] not in CLASSES:
            raise ValueError(f'line {line} is of no data set that is known here')
        whole = [int(result[key]) for key in ('seed', 'images', 'parameters', 'multiply_adds')]
        figures = [*whole, float(result['top1']), 100 - float(result['top1']), float(result['train_loss'])]
        if not all(0 <= figure < math.inf for figure in figures):
            raise ValueError(f'line {line} has a figure that cannot be')
    runs = [' '.join(result[key] for key in IDENTITY) for result in results]
    if len({*runs}) < len(runs):
        raise ValueError(f'there are two rows of {max(runs, key=runs.count)}')


def read_results(path: Path) -> List[Result]:
    """The rows of a CSV file, none if it isn't there; a UserError if it can't be read, or has been damaged."""
    try:
        with open(path, newline='', encoding='utf-8') as file:
            results = list(csv.DictReader(file))
        _check(results)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path}: cannot be read as results ({error}); restore or correct it') from error
    return results


def _order(result: Result) -> Tuple[Any, ...]:
    """By what a table has in common, in it as in the papers' tables, then networks that are in none, then by seed."""
    row = result['model'], result['arguments']
    return (*(result[key] for key in ALIKE), PLACES.get(row, len(ROWS)), *row, int(result['seed']))


def add_result(path: Path, result: Dict[str, Any]) -> None:
    """Adds a row, in the order of tables and seeds; a ValueError if the run has one. Other processes may add theirs."""
    with locked(path, seconds=60):
        results = [*read_results(path), {key: str(value) for key, value in result.items()}]
        _check(results)
        results.sort(key=_order)
        with replacing(path) as new, open(new, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
            writer.writeheader()
            writer.writerows(results)


def _groups(results: List[Result]) -> Dict[str, Dict[Row, List[Result]]]:
    """Results that may be compared, by a title of what they have in common; in each, those of every row."""
    groups: Dict[str, Dict[Row, List[Result]]] = {}
    for result in results:
        texts = {**result, 'dataset': result['dataset'].replace('cifar', 'CIFAR-'), 'images': int(result['images'])}
        row = find_row(result['model'], result['arguments'])
        groups.setdefault(TITLE.format(**texts), {}).setdefault(row, []).append(result)
    return groups


def _error(results: List[Result]) -> Tuple[float, float]:
    """Mean and standard deviation of the error in percent; no deviation of a single seed."""
    errors = [100 - float(result['top1']) for result in results]
    return statistics.mean(errors), statistics.stdev(errors) if len(errors) > 1 else 0.0


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from its density."""
    t = np.linspace(0, 13, 130_001)
    factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = math.exp(factor) * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * t[1]
    return float(np.interp(0.475, area, t[1:]))


def _differences(rows: Dict[Row, List[Result]]) -> List[str]:
    """How far the networks are from their plain ones, if any row has two seeds: these tell what a seed makes."""
    freedom = sum(len(runs) - 1 for runs in rows.values())
    if not freedom:
        return []
    deviation = math.sqrt(sum((len(runs) - 1) * _error(runs)[1] ** 2 for runs in rows.values()) / freedom)
    plain_runs = {row.model: runs for row, runs in rows.items() if not row.arguments}
    lines = []
    for row, runs in rows.items():
        if plain := plain_runs.get(f'cifar_{row.model.removeprefix("regnet_reg_").rpartition("_")[0]}'):
            interval = _student(freedom) * deviation * math.sqrt(1 / len(runs) + 1 / len(plain))
            lines.append(f'- {row}: {_error(runs)[0] - _error(plain)[0]:+.2f} ± {interval:.2f}')
    title = f"Error minus the plain network's, 95 % interval over seeds (Student's t, deviation {deviation:.2f}):"
    return [title, '', *lines, ''] if lines else []


def report(results: List[Result]) -> str:
    """Markdown: for all runs that may be compared a table of errors beside the papers'."""
    lines = []
    for title, rows in _groups(results).items():
        found = {key: {run[key] for runs in rows.values() for run in runs} for key in VERSIONS}
        versions = ', '.join(f'{key} {" and ".join(sorted(values))}' for key, values in found.items())
        columns = ['model', 'parameters', 'multiply-adds', 'error, %', 'seeds', 'training loss', "papers' error, %"]
        lines += [f'{title}. Trained with {versions}:', '', *output.header(columns)]
        for row, runs in rows.items():
            mean, deviation = _error(runs)
            loss = statistics.mean(float(run['train_loss']) for run in runs)
            parameters, multiply_adds = (int(runs[0][key]) / 1e6 for key in ('parameters', 'multiply_adds'))
            error = f'{mean:.2f} ± {deviation:.2f}' if len(runs) > 1 else f'{mean:.2f}'
            figures = f'{parameters:.3f}M', f'{multiply_adds:.1f}M', error, f'{len(runs)}', f'{loss:.3f}'
            lines.append(output.row([str(row), *figures, getattr(row, runs[0]['dataset'])]))
        lines += ['', *_differences(rows)]
    return '\n'.join(lines)


def draw(results: List[Result], path: Path) -> None:
    """The error over the parameters, measured (filled) and the papers' (hollow), a panel for each table of `report`."""
    from matplotlib.figure import Figure

    groups = _groups(results)
    figure = Figure(figsize=(6 * len(groups), 4.5), layout='constrained')
    for axes, (title, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        for row, runs in rows.items():
            regulated = re.match('regnet_reg_(.+)_(convrnn|convgru|convlstm)', row.model)
            cell = row.kwargs.get('cell', 'convlstm') if row.model == 'regnet_reg' else 'plain'
            backbone, cell = regulated.groups() if regulated else (row.model.removeprefix('cifar_'), cell)
            color = f'C{["plain", "convrnn", "convgru", "convlstm"].index(cell)}'
            label = cell if cell not in axes.get_legend_handles_labels()[1] else None
            (mean, deviation), millions = _error(runs), int(runs[0]['parameters']) / 1e6
            axes.errorbar(millions, mean, deviation, fmt='o', capsize=3, color=color, label=label)
            if papers := getattr(row, runs[0]['dataset']):
                axes.plot(millions, float(papers), 'o', fillstyle='none', color=color)
            name = f'{backbone} {row.arguments.removeprefix("regulated_")}'
            axes.annotate(name, (millions, mean), xytext=(4, 4), textcoords='offset points', fontsize=7)
        axes.set_title(title.replace(', settings', ',\nsettings'), fontsize='medium')
        axes.set(xlabel='parameters, millions', ylabel='error, %')
        axes.margins(x=0.4)  # for the names
        axes.legend(title="hollow: papers', 164 epochs")
    with replacing(path) as new:
        figure.savefig(new, dpi=100, format='png', metadata={'Software': None})
