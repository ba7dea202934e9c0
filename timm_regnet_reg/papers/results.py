"""The rows of the papers' CIFAR tables, runs of them, the CSV files of what was trained, and what these tell."""

import ast
import csv
import hashlib
import io
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np

from ..errors import UserError
from ..weights.files import locked, replacing
from .cifar import CLASSES

__all__ = ['COLUMNS', 'ROWS', 'TABLES', 'Row', 'Run', 'add_result', 'draw', 'read_results', 'report']


class Row(NamedTuple):
    """A row of the papers' tables: a model, its errors (%) there, and its arguments as --model-kwargs takes them."""

    model: str
    cifar10: float
    cifar100: float
    arguments: str = ''

    @property
    def kwargs(self) -> Dict[str, Any]:
        pairs = (argument.split('=') for argument in self.arguments.split())
        return {key: ast.literal_eval(value) for key, value in pairs}

    def __str__(self) -> str:
        return ' '.join(filter(None, (self.model, self.arguments)))


TABLES: Dict[str, List[Row]] = {
    'resnet20': [
        Row('cifar_resnet20', 8.38, 31.72),
        Row('regnet_reg_resnet20_convrnn', 7.60, 30.03),
        Row('regnet_reg_resnet20_convgru', 7.42, 29.69),
        Row('regnet_reg_resnet20_convlstm', 7.28, 29.81),
    ],
    'seresnet20': [
        Row('cifar_seresnet20', 8.02, 31.14),
        Row('regnet_reg_seresnet20_convrnn', 7.55, 29.63),
        Row('regnet_reg_seresnet20_convgru', 7.25, 29.08),
        Row('regnet_reg_seresnet20_convlstm', 6.98, 29.02),
    ],
    'stages': [
        Row('regnet_reg_resnet20_convgru', 7.52, 30.40, 'regulated_stages=(1,)'),
        Row('regnet_reg_resnet20_convgru', 7.48, 30.34, 'regulated_stages=(2,)'),
        Row('regnet_reg_resnet20_convgru', 7.49, 30.30, 'regulated_stages=(3,)'),
        Row('regnet_reg_resnet20_convlstm', 7.56, 30.23, 'regulated_stages=(1,)'),
        Row('regnet_reg_resnet20_convlstm', 7.49, 30.28, 'regulated_stages=(2,)'),
        Row('regnet_reg_resnet20_convlstm', 7.52, 29.92, 'regulated_stages=(3,)'),
    ],
    'depth': [
        Row('cifar_resnet32', 7.54, 29.86),
        Row('regnet_reg_resnet32_convgru', 6.60, 27.42),
        Row('regnet_reg_resnet32_convlstm', 6.88, 28.11),
        Row('cifar_resnet56', 6.78, 28.14),
        Row('regnet_reg_resnet56_convgru', 6.39, 27.02),
        Row('regnet_reg_resnet56_convlstm', 6.45, 27.26),
    ],
}
ROWS = [row for rows in TABLES.values() for row in rows]
PLACES = {(row.model, row.arguments): place for place, row in enumerate(ROWS)}
# what a run is known by; it may have one row
IDENTITY = ['model', 'arguments', 'dataset', 'schedule', 'engine', 'precision', 'images', 'seed', 'epochs', 'settings']
MEASURED = ['top1', 'top5', 'train_loss', 'parameters', 'multiply_adds', 'seconds']
VERSIONS = ['device', 'timm_regnet_reg', 'timm', 'torch', 'python']
COLUMNS = IDENTITY + MEASURED + VERSIONS + ['options']
# what rows must have in common for a mean or a table
ALIKE = ['dataset', 'schedule', 'epochs', 'engine', 'precision', 'images', 'settings']


@dataclass(frozen=True, eq=False)
class Run:
    """One training of a row, by all that decides its result.

    Args:
        row: What is trained.
        dataset: 'cifar10' or 'cifar100'.
        schedule: Name of the recipe among the data set's.
        seed: Of the weights, the order of the images and their views.
        engine: 'resident' or 'train.py'.
        recipe: The recipe's options, and those of the precision.
        images: The number of images in train/ and validation/.
    """

    row: Row
    dataset: str
    schedule: str
    seed: int
    engine: str
    recipe: Dict[str, Any]
    images: Dict[str, int]

    def __str__(self) -> str:
        return f'{self.row}, seed {self.seed}'

    @property
    def classes(self) -> int:
        return CLASSES[self.dataset]

    @property
    def identity(self) -> Dict[str, str]:
        """The columns `IDENTITY`; `settings` is a digest of what the runs of a table are given alike."""
        settings = json.dumps([self.recipe, self.images], sort_keys=True).encode()
        values = {
            **self.row._asdict(),
            **vars(self),
            'precision': 'bf16' if self.recipe.get('amp') else 'float32',
            'images': self.images['validation'],
            'epochs': self.recipe['epochs'],
            'settings': hashlib.sha256(settings).hexdigest()[:12],
        }
        return {key: str(values[key]) for key in IDENTITY}

    @property
    def name(self) -> str:
        """Of the run's folder."""
        facts = self.identity
        stages = ''.join(f'-stage{i}' for i in self.row.kwargs.get('regulated_stages', ()))
        names = [facts[key] for key in ('dataset', 'schedule', 'engine', 'precision', 'model')]
        return f'{"-".join(names)}{stages}-seed{self.seed}-{facts["settings"]}'

    def has_result(self, results: List[Dict[str, str]]) -> bool:
        return any(self.identity.items() <= result.items() for result in results)


def read_results(path: Path) -> List[Dict[str, str]]:
    """The rows of a CSV file that `add_result` wrote; none if it isn't there.

    Raises:
        UserError: It can't be read, or has been damaged.
    """
    try:
        with open(path, newline='', encoding='utf-8') as file:
            results = list(csv.DictReader(file))
        for line, result in enumerate(results, start=2):
            if {*result} != {*COLUMNS} or None in result.values():
                raise ValueError(f'line {line} has not the columns {", ".join(COLUMNS)}')
            if (result['model'], result['arguments']) not in PLACES or not hasattr(ROWS[0], result['dataset']):
                raise ValueError(f'line {line} is of no row of the tables')
            for key in ('seed', 'images', 'parameters', 'multiply_adds'):
                int(result[key])
            if not math.isfinite(float(result['train_loss'])) or not 0 <= float(result['top1']) <= 100:
                raise ValueError(f'line {line} has an accuracy or a loss that cannot be')
        runs = [tuple(result[key] for key in IDENTITY) for result in results]
        if twice := [run for run in runs if runs.count(run) > 1]:
            raise ValueError(f'there are two rows of {" ".join(filter(None, twice[0]))}')
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f'{path}: cannot be read as results ({error}); restore or correct it') from error
    return results


def add_result(path: Path, result: Dict[str, Any]) -> None:
    """Adds a row, in the order of the tables and seeds; other processes may do so at the same time.

    Raises:
        UserError: The file can't be read or written, or has a row of that run.
    """
    with locked(path, seconds=60):
        results = read_results(path)
        if any(all(known[key] == str(result[key]) for key in IDENTITY) for known in results):
            raise UserError(f'{path}: has a row of this run, which stays')
        results.append({key: str(value) for key, value in result.items()})
        results.sort(key=lambda r: (*(r[key] for key in ALIKE), PLACES[r['model'], r['arguments']], int(r['seed'])))
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(results)
        with replacing(path) as new:
            new.write_text(text.getvalue(), encoding='utf-8')


def _groups(results: List[Dict[str, str]]) -> Dict[Tuple[str, ...], Dict[Row, List[Dict[str, str]]]]:
    """Results that may be compared, by what they have in common; in each, the results of every row that has any."""
    groups: Dict[Tuple[str, ...], Dict[Row, List[Dict[str, str]]]] = {}
    for result in results:
        row = ROWS[PLACES[result['model'], result['arguments']]]
        groups.setdefault(tuple(result[key] for key in ALIKE), {}).setdefault(row, []).append(result)
    return groups


def _title(alike: Tuple[str, ...]) -> str:
    dataset, schedule, epochs, engine, precision, images, settings = alike
    return (
        f'{dataset.replace("cifar", "CIFAR-")}, schedule {schedule}, {epochs} epochs, {precision}, by {engine}, '
        f'{int(images):,} images, settings {settings}'
    )


def _error(results: List[Dict[str, str]]) -> Tuple[float, float]:
    """Mean and standard deviation of the error in percent; no deviation of a single seed."""
    errors = [100 - float(result['top1']) for result in results]
    return statistics.mean(errors), statistics.stdev(errors) if len(errors) > 1 else 0.0


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from its density."""
    t = np.linspace(0, 13, 130_001)
    factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = math.exp(factor) * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2) * t[1]
    return float(t[1 + np.searchsorted(area, 0.475)])


def _differences(rows: Dict[Row, List[Dict[str, str]]]) -> List[str]:
    """How far the networks are from their plain ones, if any row has two seeds: these tell what a seed makes."""
    freedom = sum(len(runs) - 1 for runs in rows.values())
    if not freedom:
        return []
    squares = sum((len(runs) - 1) * _error(runs)[1] ** 2 for runs in rows.values())
    deviation = math.sqrt(squares / freedom)
    lines = []
    for row, runs in rows.items():
        plain = next((plain for plain in rows if plain.model == f'cifar_{row.model.split("_")[-2]}'), None)
        if plain:
            interval = _student(freedom) * deviation * math.sqrt(1 / len(runs) + 1 / len(rows[plain]))
            lines.append(f'- {row}: {_error(runs)[0] - _error(rows[plain])[0]:+.2f} ± {interval:.2f}')
    title = f"Error minus the plain network's, 95 % interval over seeds (Student's t, deviation {deviation:.2f}):"
    return [title, '', *lines, ''] if lines else []


def report(results: List[Dict[str, str]]) -> str:
    """Markdown: for all runs that may be compared a table of errors beside the papers'."""
    lines = []
    for alike, rows in _groups(results).items():
        found = {key: {run[key] for runs in rows.values() for run in runs} for key in VERSIONS}
        versions = ', '.join(f'{key} {" and ".join(sorted(values))}' for key, values in found.items())
        lines += [
            f'{_title(alike)}. Trained with {versions}:',
            '',
            "| model | parameters | multiply-adds | error, % | seeds | training loss | papers' error, % |",
            '|---|---:|---:|---:|---:|---:|---:|',
        ]
        for row, runs in rows.items():
            mean, deviation = _error(runs)
            loss = statistics.mean(float(run['train_loss']) for run in runs)
            lines.append(
                f'| {row} '
                f'| {int(runs[0]["parameters"]) / 1e6:.3f}M | {int(runs[0]["multiply_adds"]) / 1e6:.1f}M '
                f'| {mean:.2f}{f" ± {deviation:.2f}" if len(runs) > 1 else ""} | {len(runs)} '
                f'| {loss:.3f} | {getattr(row, alike[0]):.2f} |'
            )
        lines += ['', *_differences(rows)]
    return '\n'.join(lines)


def draw(results: List[Dict[str, str]], path: Path) -> None:
    """The error over the parameters, measured (filled) and the papers' (hollow), a panel for each table of `report`."""
    from matplotlib.figure import Figure

    groups = _groups(results)
    figure = Figure(figsize=(6 * len(groups), 4.5), layout='constrained')
    for axes, (alike, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        for color, kind in enumerate(('plain', 'convrnn', 'convgru', 'convlstm')):
            chosen = [row for row in rows if (row.model.split('_')[-1] if row.model[0] == 'r' else 'plain') == kind]
            if not chosen:
                continue
            millions = [int(rows[row][0]['parameters']) / 1e6 for row in chosen]
            means, deviations = zip(*(_error(rows[row]) for row in chosen))
            axes.errorbar(millions, means, deviations, fmt='o', capsize=3, color=f'C{color}', label=kind)
            papers = [getattr(row, alike[0]) for row in chosen]
            axes.plot(millions, papers, 'o', fillstyle='none', color=f'C{color}')
            for x, y, row in zip(millions, means, chosen):
                backbone = row.model.split('_')[-1 if kind == 'plain' else -2]
                name = f'{backbone} {row.arguments.removeprefix("regulated_")}'
                axes.annotate(name, (x, y), xytext=(4, 4), textcoords='offset points', fontsize=7)
        axes.set_title(_title(alike).replace(', settings', ',\nsettings'), fontsize='medium')
        axes.set(xlabel='parameters, millions', ylabel='error, %')
        axes.margins(x=0.12)  # for the names
        axes.legend(title="hollow: papers', 164 epochs")
    with replacing(path) as new:
        figure.savefig(new, dpi=100, format='png', metadata={'Software': None})
