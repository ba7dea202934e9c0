"""Steps of a network, and what they take: time and memory."""

import json
import os
import tempfile
import timeit
from itertools import accumulate
from typing import Any, Callable, Dict, List

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], None]


def create_step(model: nn.Module, images: torch.Tensor, train: bool, amp: bool) -> Step:
    """Inference, or forward and backward without an optimizer, in bfloat16 autocast if `amp`."""
    parameters = list(model.train(train).parameters())
    labels = torch.arange(len(images), device=images.device) % 10  # no network has fewer classes

    def step() -> None:
        with torch.inference_mode(not train), torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = model(images)
        if train:
            torch.autograd.grad(F.cross_entropy(logits.float(), labels), parameters)

    return step


def stopwatch(step: Step) -> Callable[[], float]:
    """What tells the seconds of a step, timing as many as take 0.2 s; it warms up first, and compiles what it must."""
    step()
    from torch.utils.benchmark import timer  # not for every command: it warns of a CUDA without a GPU

    clock = timeit.Timer(step, timer=timer)  # which waits for the GPU
    number, _ = clock.autorange()
    return lambda: clock.timeit(number) / number


def capture(step: Step) -> Step:
    """The step in a CUDA graph, which keeps its memory. It must have run before, on the same stream.

    On the default stream nothing can be captured; and autograd may remember the stream of an earlier step.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph.replay


def _trace(step: Step, activity: ProfilerActivity) -> List[Dict[str, Any]]:
    """The events that torch's profiler sees in a step."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it would report each start and stop
    with profile(activities=[activity], profile_memory=activity is ProfilerActivity.CPU) as profiler:
        step()
        if activity is ProfilerActivity.CUDA:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'trace.json')
        profiler.export_chrome_trace(path)
        with open(path) as file:
            return json.load(file)['traceEvents']


def kernel_time(step: Step) -> float:
    """The seconds of all kernels, copies and fills that a step runs on the GPU; a RuntimeError if none can be seen."""
    kinds = ('kernel', 'gpu_memcpy', 'gpu_memset')
    times = [event['dur'] for event in _trace(step, ProfilerActivity.CUDA) if event.get('cat') in kinds]
    if not times:
        raise RuntimeError("torch's profiler saw no kernels: CUPTI doesn't work here")
    return 1e-6 * sum(times)


def peak_memory(step: Step, device: torch.device) -> int:
    """The most bytes that a step holds at a time, above what was allocated before it; see `bench`'s docstring."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    changes = [event for event in _trace(step, ProfilerActivity.CPU) if event['name'] == '[memory]']
    changes.sort(key=lambda event: event['ts'])
    return max(accumulate((event['args']['Bytes'] for event in changes), initial=0))  # negative for a release
