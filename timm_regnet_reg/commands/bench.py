"""Measure throughput and memory beside the plain networks.

    regnet-reg bench                                            # ResNet-20 and ResNet-50 and what regulates them
    regnet-reg bench --backbone resnet101 --batch-size 32 --output bench
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
import csv
import json
import math
import os
import platform
import statistics
import tempfile
import timeit
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch.fx.experimental.optimization import fuse
from torch.utils.benchmark import timer
from tqdm import tqdm

from ..blocks import RegulatedStage
from ..cells import CELLS, ConvLSTM
from ..equations import Kernels, State
from ..errors import UserError
from ..regnet_reg import BACKBONES, CIFAR_BACKBONES
from .table import count

__all__ = ['Contender', 'DenseConvRNN', 'NaiveConvLSTM', 'measure', 'networks', 'peak_memory', 'scaling_exponent']

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
PLAIN, FOLDED, COMPILED, NAIVE, DENSE = 'plain', 'folded', 'compiled', 'naive convlstm', 'dense convrnn'
SHORTEST = 0.2  # seconds; steps that are faster are timed several at once
INSTALL = 'pip install "timm-regnet-reg[bench]"'


# What the regulators are compared with


class NaiveConvLSTM(ConvLSTM):
    """The ConvLSTM as its equations are written: two convolutions a gate, and everything kept for backward."""

    def forward(self) -> Kernels:
        return [self.pointwise, self.depthwise, self.bias]

    @staticmethod
    def step(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
        """As equations.convlstm, but W is the cell's three parameters."""
        if H is None:
            H = C = torch.zeros_like(X)

        def conv(pointwise: torch.Tensor, depthwise: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            pairs = torch.stack([X, H], dim=2).flatten(1, 2)  # X_0, H_0, X_1, H_1, …
            fused = F.conv2d(pairs, pointwise, groups=X.shape[1])
            return F.conv2d(fused, depthwise, bias, padding=1, groups=X.shape[1])

        i, f, o, g = (conv(*w) for w in zip(*(w.chunk(4) for w in W)))
        C = torch.sigmoid(f) * C + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(C), C


class DenseConvRNN(nn.Module):
    """H' = tanh(W * [X, H]) with one 3x3 convolution of 2N to N channels."""

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 3, padding=1, device=device, dtype=dtype)

    def forward(self) -> Kernels:
        return [self.conv.weight, self.conv.bias]

    @staticmethod
    def step(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
        """X and H (B, N, height, width) to the new H."""
        H = torch.zeros_like(X) if H is None else H
        return torch.tanh(F.conv2d(torch.cat([X, H], dim=1), *W, padding=1)), C


class Regulators(nn.Module):
    """The regulators of a network without their network: each runs as many steps as its stage has blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        stages = _regulated_stages(model)
        self.cells = nn.ModuleList(stage.regulator for stage in stages)
        self.steps = [len(stage) for stage in stages]

    def forward(self, *Xs: torch.Tensor) -> List[torch.Tensor]:
        """The input X of each stage, (B, N, height, width), to the last H of each."""
        Hs = []
        for cell, steps, X in zip(self.cells, self.steps, Xs):
            W, H, C = cell(), None, None
            for _ in range(steps):
                H, C = cell.step(X, H, C, W)
            Hs.append(H)
        return Hs


def _regulated_stages(model: nn.Module) -> List[RegulatedStage]:
    return [stage for stage in model.children() if isinstance(stage, RegulatedStage)]


def _regulator_inputs(model: nn.Module, images: torch.Tensor) -> List[torch.Tensor]:
    """Random numbers in the shape that each regulator of the network reads for these images."""
    shapes: List[torch.Size] = []
    hooks = [
        stage[0].regulator_bn.register_forward_hook(lambda bn, inputs, output: shapes.append(output.shape[1:]))
        for stage in _regulated_stages(model)
    ]
    with torch.no_grad():
        model.eval()(images[:1])
    for hook in hooks:
        hook.remove()
    return [torch.randn(len(images), *shape, device=images.device) for shape in shapes]


def networks(backbone: str, device: Any = None) -> Dict[str, nn.Module]:
    """The networks to compare, by name: plain, one with each cell, naive and dense.

    Args:
        backbone: 'resnet20', 'resnet50', …
        device: Where they are to be.

    Raises:
        UserError: Unknown backbone.
    """
    known = [*CIFAR_BACKBONES, *BACKBONES]
    if backbone not in known:
        raise UserError(f'unknown backbone {backbone!r}: choose one of {", ".join(known)}')

    def plain() -> nn.Module:
        return timm.create_model(f'regnet_reg_{backbone}_convlstm', regulated_stages=(), device=device)

    models = {PLAIN: plain()}
    for cell in CELLS:
        models[cell] = timm.create_model(f'regnet_reg_{backbone}_{cell}', device=device)
    for name, cell_class in ((NAIVE, NaiveConvLSTM), (DENSE, DenseConvRNN)):
        models[name] = plain()
        for child, stage in list(models[name].named_children()):
            if child.startswith('layer'):
                setattr(models[name], child, RegulatedStage(stage, cell_class, nn.BatchNorm2d))
    return models


# Measuring


def _train(model: nn.Module, images: torch.Tensor) -> None:
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images), device=images.device) % logits.shape[1]).backward()
    model.zero_grad()


@torch.inference_mode()
def _infer(model: nn.Module, *inputs: torch.Tensor) -> None:
    model(*inputs)


@dataclass
class Contender:
    """A network in one phase, and what was measured of it.

    Args:
        name: What the tables call it.
        model: The network.
        run: Makes a step of a network and its inputs.
        inputs: Tensors (B, C, height, width).
        reference: The contender that ratios refer to; None for itself.
        eager: The contender whose memory format this one takes without a trial: it would compile once for each.
        parameters: How many it has.
        multiply_adds: Of the forward of one image.
    """

    name: str
    model: nn.Module
    run: Callable[..., None]
    inputs: Sequence[torch.Tensor]
    reference: Optional['Contender'] = None
    eager: Optional['Contender'] = None
    parameters: Optional[int] = None
    multiply_adds: Optional[int] = None
    memory_format: str = field(default='', init=False)
    steps: int = field(default=1, init=False)  # timed at once
    seconds: List[float] = field(default_factory=list, init=False)  # of a step, repeat by repeat
    peak: Optional[int] = field(default=None, init=False)  # bytes
    checkpointed_peak: Optional[int] = field(default=None, init=False)  # bytes

    def step(self) -> None:
        self.run(self.model, *self.inputs)

    def time(self) -> float:
        """Seconds that a step takes."""
        return timeit.Timer(self.step, timer=timer).timeit(self.steps) / self.steps

    def _set_format(self, name: str) -> None:
        self.memory_format = name
        self.model.to(memory_format=FORMATS[name])
        self.inputs = [x.to(memory_format=FORMATS[name]) for x in self.inputs]

    @staticmethod
    def _enough(seconds: float) -> int:
        return max(1, math.ceil(SHORTEST / seconds))

    def warm_up(self) -> None:
        """Choose the memory format, unless an eager contender has, and how many steps to time at once."""
        trials = {}
        for name in FORMATS if self.eager is None else [self.eager.memory_format]:
            self._set_format(name)
            self.step()
            self.steps = 1
            trials[name] = self.time()
            self.steps = self._enough(trials[name])
            if self.steps > 1:
                trials[name] = self.time()
        best = min(trials, key=trials.get)
        if best != self.memory_format:
            self._set_format(best)
        self.steps = self._enough(trials[best])

    @property
    def images_per_second(self) -> List[float]:
        """Throughput, repeat by repeat."""
        return [len(self.inputs[0]) / seconds for seconds in self.seconds]

    @property
    def ratios(self) -> List[float]:
        """Throughput divided by the reference's in the same repeat."""
        return [r / s for s, r in zip(self.seconds, (self.reference or self).seconds)]


def measure(contenders: Sequence[Contender], repeats: int, progress: tqdm) -> None:
    """Time contenders in turn, `repeats` times; `progress` advances by one for each warm-up and each repeat."""
    for contender in contenders:
        contender.warm_up()
        progress.update()
    for _ in range(repeats):
        for contender in contenders:
            contender.seconds.append(contender.time())
            progress.update()


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that a step holds at a time, above what was allocated before it; see this module's docstring."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it would report each start and stop, across the progress bar
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'trace.json')
        profile.export_chrome_trace(path)
        with open(path) as file:
            events = json.load(file)['traceEvents']
    peak = held = 0
    for event in sorted((e for e in events if e['name'] == '[memory]'), key=lambda e: e['ts']):
        held += event['args']['Bytes']  # negative for a release
        peak = max(peak, held)
    return peak


def _measure_peaks(contender: Contender, device: torch.device) -> None:
    contender.peak = peak_memory(contender.step, device)
    contender.model.set_grad_checkpointing(True)
    contender.checkpointed_peak = peak_memory(contender.step, device)
    contender.model.set_grad_checkpointing(False)


def bench(
    backbone: str,
    batch_size: int,
    image_size: int,
    repeats: int,
    device: torch.device,
    compile: bool = False,
) -> Dict[str, List[Contender]]:
    """Measure a backbone and what regulates it.

    Args:
        backbone: 'resnet20', 'resnet50', …
        batch_size: Images in a step.
        image_size: Their height and width in pixels.
        repeats: How often each network is timed in each phase.
        device: Where.
        compile: Time the plain and the regulated networks compiled, too.

    Returns:
        The contenders of each phase: 'train', 'inference', 'regulators'.

    Raises:
        UserError: Unknown backbone.
    """
    torch.manual_seed(0)
    models = networks(backbone, device)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    counts = {name: count(model.eval(), images[:1]) for name, model in models.items()}

    def enter(
        phase: List[Contender],
        models: Dict[str, nn.Module],
        run: Callable[..., None],
        kind: str = '',
        counts: Dict[str, Tuple[int, int]] = counts,
    ) -> None:
        """Add contenders to a phase, the first model of which is the others' reference."""
        eager = {contender.name: contender for contender in phase} if kind == COMPILED else {}
        reference = None
        for name, model in models.items():
            full_name = f'{name}, {kind}' if kind else name
            phase.append(Contender(full_name, model, run, [images], reference, eager.get(name), *counts[name]))
            reference = reference or phase[-1]

    phases: Dict[str, List[Contender]] = {'train': [], 'inference': [], 'regulators': []}
    trained = [PLAIN, *CELLS]
    compiled = {name: torch.compile(models[name]) for name in trained} if compile else {}

    for model in models.values():
        model.train()
    enter(phases['train'], models, _train)
    enter(phases['train'], compiled, _train, COMPILED)
    with _progress(f'{backbone} train', (2 + repeats) * len(models) + (1 + repeats) * len(compiled)) as progress:
        measure(phases['train'], repeats, progress)
        for contender in phases['train'][: len(models)]:
            _measure_peaks(contender, device)
            progress.update()

    for model in models.values():
        model.eval()
    folded = {name: fuse(models[name]) if name == PLAIN else reparameterize_model(models[name]) for name in trained}
    enter(phases['inference'], models, _infer)
    enter(phases['inference'], folded, _infer, FOLDED, {name: count(m, images[:1]) for name, m in folded.items()})
    enter(phases['inference'], compiled, _infer, COMPILED)
    with _progress(f'{backbone} inference', (1 + repeats) * len(phases['inference'])) as progress:
        measure(phases['inference'], repeats, progress)

    inputs = _regulator_inputs(models[DENSE], images)
    dense = None
    for name in (DENSE, NAIVE, *CELLS):
        model = Regulators(models[name])
        counts_alone = count(model, *(X[:1] for X in inputs))
        phases['regulators'].append(Contender(name, model, _infer, inputs, dense, None, *counts_alone))
        dense = phases['regulators'][0]
    with _progress(f'{backbone} regulators', (1 + repeats) * len(phases['regulators'])) as progress:
        measure(phases['regulators'], repeats, progress)
    return phases


def _progress(what: str, total: int) -> tqdm:
    return tqdm(desc=what, total=total, leave=False, unit='run')


# How time grows


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
        batch_size: The largest batch; pixels and blocks are varied at a quarter of it.
        image_size: Height and width of the smallest images, in pixels, at which batch and blocks are varied.
        repeats: How often each is timed.
        device: Where.

    Returns:
        For each phase ('train', 'inference') and what varies ('batch', 'pixels', 'blocks') the sizes and contenders.
    """
    torch.manual_seed(0)
    small = max(1, batch_size // 4)
    points = [('batch', batch, batch, image_size, 20) for batch in (max(1, batch_size // k) for k in (8, 4, 2, 1))]
    points += [('pixels', side**2, small, side, 20) for side in (image_size * k // 2 for k in (2, 3, 4, 6))]
    points += [('blocks', (depth - 2) // 2, small, image_size, depth) for depth in (20, 32, 44, 56, 110)]
    models = [timm.create_model(f'regnet_reg_resnet{point[-1]}_convlstm', device=device) for point in points]
    results: Dict[Tuple[str, str], List[Tuple[int, Contender]]] = {}
    for phase, run in (('train', _train), ('inference', _infer)):
        contenders = []
        for model, (what, size, batch, side, _) in zip(models, points):
            images = torch.randn(batch, 3, side, side, device=device)
            contenders.append(Contender(f'{what} {size}', model.train(phase == 'train'), run, [images]))
            results.setdefault((phase, what), []).append((size, contenders[-1]))
        with _progress(f'scaling {phase}', (1 + repeats) * len(contenders)) as progress:
            measure(contenders, repeats, progress)
    return results


# What is printed and written


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
    train = reference.peak is not None
    columns = ['network', 'parameters, M', 'multiply-adds, G', 'memory format', 'images/s', f'÷ {reference.name}']
    if train:
        columns += ['peak memory, MiB', 'ratio', 'checkpointed, MiB', 'ratio']
    rows = []
    for c in contenders:
        row = [
            c.name,
            f'{c.parameters / 1e6:.3f}',
            f'{c.multiply_adds / 1e9:.4f}',
            c.memory_format,
            _spread(c.images_per_second, 1),
            _spread(c.ratios, 2),
        ]
        if train and c.peak is None:
            row += [''] * 4
        elif train:
            for peak in (c.peak, c.checkpointed_peak):
                row += [f'{peak / 2**20:.1f}', f'{peak / reference.peak:.2f}']
        rows.append(row)
    return _lines(columns, rows)


def _records(contenders: Sequence[Contender]) -> List[Dict[str, Any]]:
    """A record for every contender and repeat."""
    return [
        {
            'network': c.name,
            'parameters': c.parameters,
            'multiply_adds': c.multiply_adds,
            'memory_format': c.memory_format,
            'repeat': repeat,
            'seconds_per_step': seconds,
            'images_per_second': images_per_second,
            'reference': (c.reference or c).name,
            'ratio': ratio,
            'peak_bytes': c.peak,
            'checkpointed_peak_bytes': c.checkpointed_peak,
        }
        for c in contenders
        for repeat, (seconds, images_per_second, ratio) in enumerate(zip(c.seconds, c.images_per_second, c.ratios))
    ]


def _write_csv(path: Path, records: Sequence[Dict[str, Any]]) -> None:
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def _plot_ratios(path: Path, title: str, phases: Dict[str, List[Contender]]) -> None:
    """Bars of each phase's ratios, medians with their spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(phases), 4.5), layout='constrained')
    for axes, (phase, contenders) in zip(figure.subplots(1, len(phases)), phases.items()):
        medians = [statistics.median(c.ratios) for c in contenders]
        spread = [
            [m - min(c.ratios) for m, c in zip(medians, contenders)],
            [max(c.ratios) - m for m, c in zip(medians, contenders)],
        ]
        axes.barh([c.name for c in contenders], medians, xerr=spread, capsize=3)
        axes.axvline(1, color='black', linewidth=0.8)
        axes.invert_yaxis()
        axes.set(title=phase, xlabel=f'throughput ÷ {contenders[0].name}')
    figure.suptitle(title)
    figure.savefig(path)


def _plot_scaling(path: Path, title: str, results: Dict[Tuple[str, str], List[Tuple[int, Contender]]]) -> None:
    """Time over size, with the fitted exponent in the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout='constrained')
    axes = dict(zip(('batch', 'pixels', 'blocks'), figure.subplots(1, 3)))
    for (phase, what), points in results.items():
        sizes, seconds = _medians(points)
        axes[what].loglog(sizes, seconds, 'o-', label=f'{phase}, exponent {scaling_exponent(sizes, seconds):.2f}')
        axes[what].set(xlabel=what, ylabel='seconds per step')
        axes[what].legend()
    figure.suptitle(title)
    figure.savefig(path)


def _medians(points: Sequence[Tuple[int, Contender]]) -> Tuple[List[int], List[float]]:
    return [size for size, _ in points], [statistics.median(contender.seconds) for _, contender in points]


# The command


def _check_device(name: str) -> torch.device:
    if name != 'cpu' and not (name.partition(':')[0] == 'cuda' and torch.cuda.is_available()):
        raise UserError(
            f"device {name!r} can't be used: 'cpu' is accepted"
            + (", and 'cuda'" if torch.cuda.is_available() else "; torch finds no 'cuda' here")
        )
    return torch.device(name)


def _check_output(name: str) -> Path:
    """The folder, made if need be, before anything has been measured in vain."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f'--output plots with matplotlib, which cannot be imported ({error}); {INSTALL}') from error
    output = Path(name)
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise UserError(f'cannot write to --output {name!r}: {error}; give a folder that can be written') from error
    return output


def main(args: argparse.Namespace) -> None:
    """Measure, print, and write what `--output` asks for.

    Raises:
        UserError: Unknown backbone, no such device, too little of its memory, or an output that can't be written.
    """
    device = _check_device(args.device)
    output = _check_output(args.output) if args.output else None
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = _machine(device)
    print(machine, f'Medians of {args.repeats} repeats (smallest–largest); float32.', sep='\n')
    try:
        if args.scaling:
            _main_scaling(args, device, machine, output)
        else:
            _main_bench(args, device, machine, output)
    except torch.OutOfMemoryError as error:
        raise UserError(f'{device} has too little memory ({error}); give a smaller --batch-size') from error


def _main_bench(args: argparse.Namespace, device: torch.device, machine: str, output: Optional[Path]) -> None:
    for backbone in [args.backbone] if args.backbone else ['resnet20', 'resnet50']:
        default_batch_size, default_image_size = (128, 32) if backbone in CIFAR_BACKBONES else (16, 224)
        batch_size, image_size = args.batch_size or default_batch_size, args.image_size or default_image_size
        phases = bench(backbone, batch_size, image_size, args.repeats, device, args.compile)
        title = f'{backbone}, batch {batch_size}, {image_size}x{image_size}'
        for phase, contenders in phases.items():
            print(f'\n{title}: {phase}\n', *_phase_table(contenders), sep='\n', flush=True)
        if output is not None:
            _write_csv(
                output / f'{backbone}.csv',
                [
                    {
                        'backbone': backbone,
                        'batch_size': batch_size,
                        'image_size': image_size,
                        'phase': phase,
                        **record,
                        'machine': machine,
                    }
                    for phase, contenders in phases.items()
                    for record in _records(contenders)
                ],
            )
            _plot_ratios(output / f'{backbone}.png', f'{title}\n{machine}', phases)


def _main_scaling(args: argparse.Namespace, device: torch.device, machine: str, output: Optional[Path]) -> None:
    results = scaling(args.batch_size or 128, args.image_size or 32, args.repeats, device)
    rows = []
    for (phase, what), points in results.items():
        sizes, seconds = _medians(points)
        times = ', '.join(f'{size}: {1e3 * t:.1f}' for size, t in zip(sizes, seconds))
        rows.append([phase, what, times, f'{scaling_exponent(sizes, seconds):.3f}'])
    print('\nregnet_reg_resnet20_convlstm; blocks: regnet_reg_resnet20_convlstm to regnet_reg_resnet110_convlstm\n')
    print(*_lines(['phase', 'growing', 'size: ms a step', 'exponent'], rows), sep='\n')
    if output is not None:
        _write_csv(
            output / 'scaling.csv',
            [
                {'phase': phase, 'growing': what, 'size': size, **record, 'machine': machine}
                for (phase, what), points in results.items()
                for size, contender in points
                for record in _records([contender])
            ],
        )
        _plot_scaling(output / 'scaling.png', f'regnet_reg_resnet20_convlstm\n{machine}', results)
