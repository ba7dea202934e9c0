"""Measure speed and memory beside the plain networks.

    regnet-reg bench                                            # ResNet-20 and ResNet-50 and what regulates them
    regnet-reg bench --backbone resnet101 --networks convlstm --batch-size 32
    regnet-reg bench --amp --backbone resnet50 --repeats 3      # on a GPU, README's table of one

A backbone is measured plain and regulated by each cell; on the CPU also by naive-convlstm, the cell as its equations
are written (a grouped 1x1 and a depthwise 3x3 convolution for every gate), and by dense-convrnn, whose gate is a 3x3
convolution of X and H, all channels to all, as in other implementations. Each is measured at training (forward and
backward, no optimizer) and inference, on the CPU also reparameterised: regulated networks by
timm.utils.reparameterize_model, the plain one by torch.fx. On a GPU ConvGRU and ConvLSTM are measured with fused time
steps, too, and of each network the kernels alone and a step in a CUDA graph. All run in channels_last, and cuDNN
chooses its algorithms by trial, as in timm's train.py.

A table is printed for each backbone, row by row as it is measured. Repeats are interleaved: every network once, then
again. Figures are medians; "speed ÷ plain" is the plain network's time by the network's in the same repeat. The spread
is how far the farthest of a row's repeats is from its median. What fails for a network is told, and left out.

Peak memory is that of a training step above the loaded network and its input, so it holds activations, gradients and
torch's workspaces. On the CPU it is summed up from the allocations and releases that torch's profiler reports, which
leaves out what oneDNN allocates by itself inside of an operation; on a GPU it is the allocator's own count.
"""

import argparse
import statistics
import traceback
from typing import Any, Callable, Dict, List

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.fx.experimental.optimization import fuse

from ..arguments import positive
from ..cells import CELLS
from ..errors import UserError
from ..fused import GATES, set_fused
from ..papers.baselines import BASELINES, PLAIN, create_networks
from ..papers.output import header, row
from ..papers.timing import Step, capture, create_step, kernel_time, peak_memory, stopwatch
from ..regnet_reg import BACKBONES, CIFAR_BACKBONES
from ..weights.scoring import check_device


class Bench:
    """Measures networks and prints a row of a table for each kind of figure, with `gpu` also what only a GPU has."""

    def __init__(self, networks: List[str], repeats: int, device: torch.device, amp: bool, gpu: bool) -> None:
        self.networks, self.repeats, self.device, self.amp, self.gpu = networks, repeats, device, amp, gpu
        self.columns = {name: (name, False) for name in networks}  # of each its network, and whether that is fused
        self.columns.update({f'{name} fused': (name, True) for name in networks if gpu and name in GATES})
        self.failures: List[str] = []

    def run(self, backbone: str, batch_size: int, compile: bool) -> None:
        """Prints the table of a backbone, 'resnet20', say; with `compile` also of its networks compiled."""
        torch.manual_seed(0)
        models = create_networks(backbone, self.networks, self.device)
        size = timm.get_pretrained_cfg(f'regnet_reg_{backbone}_convlstm').input_size
        images = torch.randn(batch_size, *size, device=self.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        print(f'\n{backbone}, batch {batch_size}, {"x".join(map(str, size[1:]))}\n')
        print(*header(['', *self.columns, 'spread']), sep='\n', flush=True)

        steps = self._steps(models, train=True)
        self._measure('train', steps, memory=True)
        for model in models.values():
            model.set_grad_checkpointing(True)
        self._memory('train, checkpointed', steps)
        for model in models.values():
            model.set_grad_checkpointing(False)
        self._measure('inference', self._steps(models, train=False))
        compared = {name: model for name, model in models.items() if name not in BASELINES}
        if not self.gpu:
            # inside another module, as of the one that it is given timm's function leaves the stem's batch norm
            merged = {
                name: fuse(model) if name == PLAIN else reparameterize_model(nn.Sequential(model))[0]
                for name, model in compared.items()
            }
            self._measure('inference, reparameterised', self._steps(merged, train=False))
        for what, train in (('train', True), ('inference', False)) if compile else ():
            torch.compiler.reset()  # all of them would exceed its limit of graphs
            self._measure(f'{what}, compiled', self._steps(compared, train, compiled=True), memory=train)

    def _steps(self, models: Dict[str, nn.Module], train: bool, compiled: bool = False) -> Dict[str, Step]:
        """A step for each column whose network is among the models; what is fused is switched before it runs."""

        def create(model: nn.Module, fused: bool) -> Step:
            model = torch.compile(model, fullgraph=True) if compiled else model
            step = create_step(model, self.images, train, self.amp)

            def run() -> None:
                set_fused(fused)
                step()

            return run if self.gpu else step

        return {c: create(models[name], fused) for c, (name, fused) in self.columns.items() if name in models}

    def _measure(self, what: str, steps: Dict[str, Step], memory: bool = False) -> None:
        self._time(what, steps)
        if memory:
            self._memory(what, steps)
        if self.gpu:
            self._compare(f'{what}, kernels alone', 'ms', self._each(what, lambda step: [kernel_time(step)], {**steps}))
            self._time(f'{what}, in a graph', self._each(f'{what}, capture', capture, {**steps}))

    def _time(self, what: str, steps: Dict[str, Step]) -> None:
        watches = self._each(what, stopwatch, steps)
        repeats = [self._each(what, lambda watch: watch(), watches) for _ in range(self.repeats)]
        self._compare(what, 'ms', {name: [seconds[name] for seconds in repeats] for name in watches})

    def _memory(self, what: str, steps: Dict[str, Step]) -> None:
        peaks = self._each(f'{what}, memory', lambda step: [peak_memory(step, self.device)], steps)
        self._compare(what, 'peak memory, MiB', peaks)

    def _each(self, what: str, function: Callable[[Any], Any], steps: Dict[str, Any]) -> Dict[str, Any]:
        """The function's value for each step; one for which it fails is told, and taken out."""
        values = {}
        for name, step in list(steps.items()):
            try:
                values[name] = function(step)
            except Exception as error:  # whatever a compiler, a kernel or an allocator stumbles over
                traceback.print_exc()
                told = (str(error).strip().splitlines() or [''])[0]
                self.failures.append(f'{what}, {name} ({type(error).__name__}: {told})')
                del steps[name]
        return values

    def _compare(self, what: str, unit: str, values: Dict[str, List[float]]) -> None:
        """A row of medians of seconds or bytes, and one of ratios to the plain network's of the same repeat."""
        kind, scale = ('speed', 1e3) if unit == 'ms' else ('memory', 2**-20)
        rows = {unit: {name: [scale * x for x in xs] for name, xs in values.items()}}
        if PLAIN in values:
            pairs = {name: list(zip(values[PLAIN], xs)) for name, xs in values.items()}
            rows[f'{kind} ÷ plain'] = {n: [p / x if kind == 'speed' else x / p for p, x in pairs[n]] for n in pairs}
        for title, figures in rows.items():
            medians = {name: statistics.median(xs) for name, xs in figures.items()}
            spread = max((abs(x / medians[name] - 1) for name, xs in figures.items() for x in xs), default=0)
            cells = [f'{medians[name]:.2f}' if name in medians else '' for name in self.columns]
            print(row([f'{what}, {title}', *cells, f'±{spread:.0%}' if spread else '']), flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    backbones, regulated = [*CIFAR_BACKBONES, *BACKBONES], [*CELLS, *BASELINES]
    parser.add_argument('--backbone', choices=backbones, metavar='NAME', help='resnet20, resnet50, …')
    told = f'beside the plain one: {", ".join(regulated)} (default: all; on a GPU the cells)'
    parser.add_argument('--networks', nargs='+', choices=regulated, metavar='NAME', help=told)
    told = 'images (default: 128 in the CIFAR form, else 16; on a GPU 128 and 1024, else 64)'
    parser.add_argument('--batch-size', type=positive, metavar='B', help=told)
    parser.add_argument('--repeats', type=positive, default=5, metavar='N', help='default: %(default)s')
    parser.add_argument('--threads', type=positive, metavar='N', help="CPU threads (default: torch's)")
    parser.add_argument('--device', help='cpu, cuda, cuda:1 and the like (default: cuda where there is one, else cpu)')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast (default: float32)')
    parser.add_argument('--compile', action='store_true', help='compiled networks, too: minutes for each')


def main(args: argparse.Namespace) -> None:
    """Measure and print; a UserError if something could not be measured."""
    device = check_device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    gpu = device.type == 'cuda'
    large = 64 if gpu else 16
    plan = [('resnet20', 128), ('resnet50', large), *([('resnet20', 1024)] if gpu else [])]
    if args.backbone:
        plan = [(args.backbone, 128 if args.backbone in CIFAR_BACKBONES else large)]
    plan = list(dict.fromkeys((backbone, args.batch_size or batch_size) for backbone, batch_size in plan))
    networks = [PLAIN, *(args.networks or ([*CELLS] if gpu else [*CELLS, *BASELINES]))]
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name(device) if gpu else f'CPU, {torch.backends.cpu.get_cpu_capability()}'
    print(f'{name}, {torch.get_num_threads()} threads; torch {torch.__version__}, timm {timm.__version__}')
    print(f'Medians of {args.repeats} repeats; {"bfloat16 autocast" if args.amp else "float32"}, channels_last')
    bench = Bench(networks, args.repeats, device, args.amp, gpu)
    # one that isn't the default: see `capture`
    with torch.cuda.stream(torch.cuda.Stream(device) if gpu else None):
        for backbone, batch_size in plan:
            bench.run(backbone, batch_size, args.compile)
    if bench.failures:
        raise UserError(f'{len(bench.failures)} could not be measured: {"; ".join(bench.failures)}')
