"""Measure throughput and memory beside the plain networks.

    regnet-reg bench                                            # ResNet-20 and ResNet-50 and what regulates them
    regnet-reg bench --backbone resnet101 --batch-size 32
    regnet-reg bench --scaling                                  # time over batch, pixels and blocks

A backbone is measured plain, regulated by each cell, and with two other regulators in the same place:

    naive convlstm   the cell as its equations are written, a grouped 1x1 and a depthwise 3x3 convolution for every gate
    dense convrnn    a 3x3 convolution of X and H, all channels to all, for the gate, as other implementations have it

in three phases: train (forward and backward, no optimizer), inference, and regulators, which is the inference of the
regulators alone, all steps of all stages. "folded" networks have their batch norms folded into their convolutions:
regulated ones by timm.utils.reparameterize_model, the plain one by torch.fx.

Every network runs in the memory format, contiguous or channels_last, that a short trial shows to be the faster one.
Repeats are interleaved: every network once, then every network once again. Figures are medians, with the smallest and
the largest in brackets; a ratio is that of two networks in the same repeat, and folded networks are compared with the
folded plain one, compiled networks with the compiled plain one.

Peak memory is that of a training step above the loaded network and its input, so it holds activations, gradients and
torch's workspaces. On the CPU it is summed up from the allocations and releases that torch's profiler reports, which
leaves out what oneDNN allocates by itself inside of an operation; on a GPU it is the allocator's own count.
"""

import argparse
import math
import os
import platform
import statistics
from typing import Callable, Dict, Iterator, List, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from ..arguments import add_device, positive
from ..cells import CELLS
from ..errors import UserError
from ..papers.baselines import DENSE, NAIVE, PLAIN, Regulators, networks, regulator_inputs
from ..papers.timing import Contender, infer, measure, measure_peaks, train
from ..regnet_reg import CIFAR_BACKBONES
from ..weights.scoring import check_device

__all__ = ['bench', 'scaling', 'scaling_exponent']


def _contenders(
    models: Dict[str, nn.Module],
    run: Callable[..., None],
    inputs: Sequence[torch.Tensor],
    kind: str = '',
    eager: Sequence[Contender] = (),
) -> List[Contender]:
    """The first is the others' reference; eager ones are matched by name."""
    contenders: List[Contender] = []
    for name, model in models.items():
        contenders.append(
            Contender(
                f'{name}, {kind}' if kind else name,
                model,
                run,
                inputs,
                reference=contenders[0] if contenders else None,
                eager=next((contender for contender in eager if contender.name == name), None),
            )
        )
    return contenders


def _progress(what: str, total: int) -> tqdm:
    return tqdm(desc=what, total=total, leave=False, unit='run')


def bench(
    backbone: str,
    batch_size: int,
    image_size: int,
    repeats: int,
    device: torch.device,
    compile: bool = False,
) -> Iterator[Tuple[str, List[Contender]]]:
    """Measure a backbone and what regulates it.

    Args:
        backbone: 'resnet20', 'resnet50', …
        batch_size: Images in a step.
        image_size: Their height and width in pixels.
        repeats: How often each network is timed in each phase.
        device: Where.
        compile: Time the plain and the regulated networks compiled, too.

    Yields:
        Each phase, 'train', 'inference' and 'regulators', with its contenders as soon as they are measured.

    Raises:
        UserError: Unknown backbone.
    """
    torch.manual_seed(0)
    models = networks(backbone, device)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    trained = [PLAIN, *CELLS]
    compiled = {name: torch.compile(models[name]) for name in trained} if compile else {}

    for model in models.values():
        model.train()
    eager = _contenders(models, train, [images])
    contenders = eager + _contenders(compiled, train, [images], 'compiled', eager)
    with _progress(f'{backbone} train', (1 + repeats) * len(contenders) + len(eager)) as progress:
        measure(contenders, repeats, progress)
        for contender in eager:
            measure_peaks(contender, device)
            progress.update()
    yield 'train', contenders

    for model in models.values():
        model.eval()
    folded = {name: fuse(models[name]) if name == PLAIN else reparameterize_model(models[name]) for name in trained}
    eager = _contenders(models, infer, [images])
    contenders = eager + _contenders(folded, infer, [images], 'folded')
    contenders += _contenders(compiled, infer, [images], 'compiled', eager)
    with _progress(f'{backbone} inference', (1 + repeats) * len(contenders)) as progress:
        measure(contenders, repeats, progress)
    yield 'inference', contenders

    regulators: Dict[str, nn.Module] = {name: Regulators(models[name]) for name in (DENSE, NAIVE, *CELLS)}
    contenders = _contenders(regulators, infer, regulator_inputs(models[DENSE], images))
    with _progress(f'{backbone} regulators', (1 + repeats) * len(contenders)) as progress:
        measure(contenders, repeats, progress)
    yield 'regulators', contenders


def scaling_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The k of seconds = a·size^k, by least squares of their logarithms."""
    return statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in seconds]).slope


def scaling(
    batch_size: int,
    image_size: int,
    repeats: int,
    device: torch.device,
) -> Dict[Tuple[str, str], List[Tuple[int, Contender]]]:
    """Time the CIFAR network regulated by a ConvLSTM over batch size, pixels and residual blocks.

    Args:
        batch_size: The largest batch, 8 or more; pixels and blocks are varied at a quarter of it.
        image_size: Height and width of the smallest images, in pixels, at which batch and blocks are varied.
        repeats: How often each is timed.
        device: Where.

    Returns:
        For each phase ('train', 'inference') and what varies ('batch', 'pixels', 'blocks') the sizes and contenders.
    """
    torch.manual_seed(0)
    points = [('batch', batch, batch, image_size, 20) for batch in (batch_size // k for k in (8, 4, 2, 1))]
    points += [('pixels', side**2, batch_size // 4, side, 20) for side in (image_size * k // 2 for k in (2, 3, 4, 6))]
    points += [('blocks', (depth - 2) // 2, batch_size // 4, image_size, depth) for depth in (20, 32, 44, 56, 110)]
    models = [timm.create_model(f'regnet_reg_resnet{point[-1]}_convlstm', device=device) for point in points]
    results: Dict[Tuple[str, str], List[Tuple[int, Contender]]] = {}
    for phase, run in (('train', train), ('inference', infer)):
        contenders = []
        for model, (what, size, batch, side, _) in zip(models, points):
            images = torch.randn(batch, 3, side, side, device=device)
            contenders.append(Contender(f'{what} {size}', model.train(phase == 'train'), run, [images]))
            results.setdefault((phase, what), []).append((size, contenders[-1]))
        with _progress(f'scaling {phase}', (1 + repeats) * len(contenders)) as progress:
            measure(contenders, repeats, progress)
    return results


# What is printed


def _machine(device: torch.device) -> str:
    """The machine in a line, without its name."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists('/proc/cpuinfo'):  # Linux, where platform.processor() seldom knows
        with open('/proc/cpuinfo') as file:
            names = [line.partition(':')[2].strip() for line in file if line.startswith('model name')]
        cpu = names[0] if names else cpu
    parts = [
        f'{cpu} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, '
        f'threads used: {torch.get_num_threads()}',
        *([torch.cuda.get_device_name(device)] if device.type == 'cuda' else []),
        f'torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}, {platform.system()}',
    ]
    return '; '.join(parts)


def _spread(values: Sequence[float], digits: int) -> str:
    """Median (smallest–largest)"""
    low, middle, high = (f'{x:.{digits}f}' for x in (min(values), statistics.median(values), max(values)))
    return f'{middle} ({low}–{high})'


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    """A Markdown table whose first column is left-aligned, padded for reading as it is."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows)]
    padded = [
        [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
        for cells in (columns, *rows)
    ]
    rule = [':' + '-' * (width - 1) if i == 0 else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    return [f'| {" | ".join(cells)} |' for cells in (padded[0], rule, *padded[1:])]


def _phase_table(contenders: Sequence[Contender]) -> List[str]:
    reference = contenders[0]
    columns = ['network', 'parameters, M', 'multiply-adds, G', 'memory format', 'images/s', f'÷ {reference.name}']
    if reference.peak:
        columns += ['peak memory, MiB', 'ratio', 'checkpointed, MiB', 'ratio']
    rows = []
    for c in contenders:
        parameters, multiply_adds = c.counts()
        row = [
            c.name,
            f'{parameters / 1e6:.3f}',
            f'{multiply_adds / 1e9:.4f}',
            c.memory_format,
            _spread(c.images_per_second, 1),
            _spread(c.ratios, 2),
        ]
        if reference.peak:
            for peak in (c.peak, c.checkpointed_peak):
                row += [f'{peak / 2**20:.1f}', f'{peak / reference.peak:.2f}'] if peak else ['', '']
        rows.append(row)
    return _lines(columns, rows)


def _plan(args: argparse.Namespace) -> List[Tuple[str, int, int]]:
    """What is to be measured, all of it checked before the first: backbone, batch size and image size."""
    if args.scaling and args.compile:
        raise UserError('--scaling times eager networks alone: leave --compile out')
    plan = []
    for backbone in [args.backbone] if args.backbone else ['resnet20'] if args.scaling else ['resnet20', 'resnet50']:
        # 2x2 pixels in the last stage are the least: a batch norm can't train on a single value
        batch_size, image_size, smallest = (128, 32, 8) if backbone in CIFAR_BACKBONES else (16, 224, 64)
        plan.append((backbone, args.batch_size or batch_size, args.image_size or image_size))
        if plan[-1][2] < smallest:
            raise UserError(f'--image-size {args.image_size} is too small for {backbone}: give at least {smallest}')
    if args.scaling and plan[0][1] < 8:
        raise UserError(f'--batch-size {args.batch_size} is too small for --scaling, which varies it: give at least 8')
    return plan


def _threads(text: str) -> int:
    number, cores = positive(text), os.cpu_count() or 1
    if number > cores:
        raise argparse.ArgumentTypeError(f'{number} was given, expected at most {cores}, the cores of this machine')
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--backbone', metavar='NAME', help='resnet20, resnext50_32x4d, … (default: resnet20 and resnet50)'
    )
    what.add_argument(
        '--scaling', action='store_true', help='fit how the time of regnet_reg_resnet20_convlstm grows, instead'
    )
    parser.add_argument(
        '--batch-size', type=positive, metavar='B', help='images (default: 128 in the CIFAR form, else 16)'
    )
    parser.add_argument(
        '--image-size', type=positive, metavar='S', help='pixels a side (default: 32 in the CIFAR form, else 224)'
    )
    parser.add_argument('--repeats', type=positive, default=5, metavar='N', help='default: 5')
    parser.add_argument('--threads', type=_threads, metavar='N', help="CPU threads (default: torch's)")
    add_device(parser)
    parser.add_argument(
        '--compile',
        action='store_true',
        help='time plain and regulated networks compiled, too (each compiles for minutes)',
    )


def main(args: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        UserError: Unknown backbone, no such device, or a batch or images too small.
    """
    device = check_device(args.device)
    plan = _plan(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(_machine(device), f'Medians of {args.repeats} repeats (smallest–largest); float32.', sep='\n')
    for backbone, batch_size, image_size in plan:
        if args.scaling:
            _print_scaling(scaling(batch_size, image_size, args.repeats, device))
        else:
            for phase, contenders in bench(backbone, batch_size, image_size, args.repeats, device, args.compile):
                title = f'{backbone}, batch {batch_size}, {image_size}x{image_size}: {phase}'
                print(f'\n{title}\n', *_phase_table(contenders), sep='\n', flush=True)


def _print_scaling(results: Dict[Tuple[str, str], List[Tuple[int, Contender]]]) -> None:
    rows = []
    for (phase, what), points in results.items():
        sizes = [size for size, _ in points]
        seconds = [statistics.median(contender.seconds) for _, contender in points]
        times = ', '.join(f'{size}: {1e3 * t:.1f}' for size, t in zip(sizes, seconds))
        rows.append([phase, what, times, f'{scaling_exponent(sizes, seconds):.3f}'])
    print('\nregnet_reg_resnet20_convlstm; blocks: regnet_reg_resnet20_convlstm to regnet_reg_resnet110_convlstm\n')
    print(*_lines(['phase', 'growing', 'size: ms a step', 'exponent'], rows), sep='\n')
