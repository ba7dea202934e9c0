"""Time and memory of networks, side by side."""

import json
import math
import os
import tempfile
import timeit
from dataclasses import dataclass, field
from typing import Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import timer
from tqdm import tqdm

from .flops import count

__all__ = ['FORMATS', 'Contender', 'infer', 'measure', 'measure_peaks', 'peak_memory', 'train']

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
SHORTEST = 0.2  # seconds; steps that are faster are timed several at once


def train(model: nn.Module, images: torch.Tensor) -> None:
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images), device=images.device) % logits.shape[1]).backward()
    model.zero_grad()


@torch.inference_mode()
def infer(model: nn.Module, *inputs: torch.Tensor) -> None:
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
    """

    name: str
    model: nn.Module
    run: Callable[..., None]
    inputs: Sequence[torch.Tensor]
    reference: Optional['Contender'] = None
    eager: Optional['Contender'] = None
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
        best = min(trials, key=lambda name: trials[name])
        if best != self.memory_format:
            self._set_format(best)
        self.steps = self._enough(trials[best])

    def counts(self) -> Tuple[int, int]:
        """Parameters, and multiply-adds of the forward of one image, in evaluation mode, which the network stays in."""
        return count((self.eager or self).model.eval(), *(x[:1] for x in self.inputs))

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
    """The most bytes that a step holds at a time, above what was allocated before it; see `bench`'s docstring."""
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


def measure_peaks(contender: Contender, device: torch.device) -> None:
    contender.peak = peak_memory(contender.step, device)
    contender.model.set_grad_checkpointing(True)
    contender.checkpointed_peak = peak_memory(contender.step, device)
    contender.model.set_grad_checkpointing(False)
