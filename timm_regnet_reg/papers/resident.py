"""Trains CIFAR networks with all images on the device, several networks at once on a GPU.

A recipe of `train_recipes/` is read as timm's train.py reads it: timm's own functions make the network, the optimizer
and the schedule of it, and what this engine doesn't do is refused by name. An update is views, forward, backward and
SGD; on a GPU all of it is one CUDA graph, with a stream for each network. An epoch's order, crops and flips follow from
the run's seed and the epoch alone, so that a run goes on exactly where it was saved, on another device too, if its
network draws no random numbers of its own.
"""

import argparse
import copy
import hashlib
import io
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import accuracy, random_seed
from torch import Tensor, nn

from ..errors import UserError, reason
from ..weights.files import replacing
from ..weights.scoring import ImageFolder, read_image
from .cifar import CLASSES, SIZE, SIZES
from .results import Run

SAVE_SECONDS = 30

# what the engine goes by of a recipe: keys that must be there, keys that may be there (the last two mean nothing here),
# and the only values that it does
NEEDED = {
    *'opt lr_base lr_base_size momentum weight_decay sched epochs'.split(),
    *'batch_size channels_last scale ratio hflip color_jitter smoothing'.split(),
}
OPTIONAL = {
    *'opt_kwargs sched_on_updates decay_milestones decay_rate min_lr warmup_epochs warmup_lr warmup_prefix'.split(),
    *'num_classes mean std amp amp_dtype device_modules train_interpolation'.split(),
}
VALUES: Dict[str, List[Any]] = {
    'opt': ['sgd', 'momentum', 'nesterov'],
    'sched': ['multistep', 'cosine'],
    'channels_last': [True],
    'scale': [[0.64, 0.64]],  # windows of 32x32 of 40x40
    'ratio': [[1.0, 1.0]],
    'color_jitter': [0.0],
    'smoothing': [0.0],
    'amp_dtype': ['bfloat16'],
}


def read_recipe(path) -> Dict[str, Any]:
    """The recipe in that file; a UserError if there is none, or it can't be read."""
    try:
        recipe = {**yaml.safe_load(Path(path).read_text(encoding='utf-8'))}
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        told = ' '.join(str(error).split())  # one line of it
        raise UserError(f'{path}: cannot be read as a recipe ({told}); give a YAML file of options') from error
    # YAML takes 5e-4 for text, of which train.py makes a number
    return {k: float(v) if re.fullmatch(r'[-+]?\d+\.?\d*[eE][-+]?\d+', str(v)) else v for k, v in recipe.items()}


def check_recipe(recipe: Dict[str, Any]) -> None:
    """Raises a UserError that names what this engine can't do of a recipe."""
    needed = NEEDED | ({'decay_milestones'} if recipe.get('sched') == 'multistep' else set())
    needed |= {'amp_dtype'} if recipe.get('amp') else set()
    known = {key: VALUES.get(key, [value]) for key, value in recipe.items() if key in NEEDED | OPTIONAL}
    wrong = [f'{key}: {value}' for key, value in recipe.items() if value not in known.get(key, [])]
    wrong += [f'opt_kwargs: {key}' for key in recipe.get('opt_kwargs') or {} if key != 'filter_bias_and_bn']
    wrong += [f'no {key}' for key in sorted(needed - recipe.keys())]
    if wrong:
        raise UserError(f"the recipe has {', '.join(wrong)}; that needs timm's train.py: give TRAIN_PY, too")


def _options(recipe: Dict[str, Any]) -> argparse.Namespace:
    """The recipe as timm's functions want it, with the learning rate that train.py makes of it."""
    return argparse.Namespace(lr=recipe['lr_base'] * recipe['batch_size'] / recipe['lr_base_size'], **recipe)


def _optimizer(model: nn.Module, recipe: Dict[str, Any], **kwargs: Any) -> torch.optim.Optimizer:
    more = {**(recipe.get('opt_kwargs') or {}), **kwargs}
    return create_optimizer_v2(model, **optimizer_kwargs(_options(recipe)), **more)


def learning_rates(recipe: Dict[str, Any], updates_per_epoch: int) -> List[float]:
    """The learning rate of every update of a training."""
    optimizer = _optimizer(nn.Linear(1, 1), recipe)
    options = scheduler_kwargs(_options(recipe))
    scheduler, epochs = create_scheduler_v2(optimizer, **options, updates_per_epoch=updates_per_epoch)
    rates = []
    for epoch in range(epochs):
        for update in range(epoch * updates_per_epoch, (epoch + 1) * updates_per_epoch):
            rates.append(optimizer.param_groups[0]['lr'])
            scheduler.step_update(update + 1)
        scheduler.step(epoch + 1)
    return rates


class Images(NamedTuple):
    """uint8 images (n, size, size, 3) and classes (n,): training images of 40x40, test images of 32x32."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def _read_pixels(path: str, size: int) -> np.ndarray:
    image = read_image(path, upright=False)
    if image.size != (size, size):
        told = f'is {image.width}x{image.height}, expected {size}x{size}'
        raise UserError(f'{path}: {told}; `regnet-reg cifar` writes such images')
    return np.asarray(image)


def find_splits(folder: str, dataset: str) -> Tuple[Dict[str, ImageFolder], Dict[str, Any]]:
    """The images of both splits, in timm's order, and what they are known by; a UserError if they aren't CIFAR's."""
    found, known, digest = {}, {}, hashlib.sha256()
    for split, size in SIZES.items():
        found[split] = ImageFolder(Path(folder, split), {'input_size': (3, size, size)}, CLASSES[dataset])
        paths, labels = zip(*found[split].reader.samples)
        digest.update(repr([found[split].label_names, labels]).encode())
        for path in paths[:: len(paths) // 100 + 1]:  # a hundred at most, as all would take long
            digest.update(_read_pixels(path, size).tobytes())
        known[split] = len(paths)
    return found, {**known, 'digest': digest.hexdigest()[:8]}


def read_images(found: Dict[str, ImageFolder], device: torch.device) -> Images:
    """What `find_splits` found; a UserError if an image is damaged or of another size."""
    tensors = []
    with ThreadPoolExecutor() as pool:
        for split, size in SIZES.items():
            paths, labels = zip(*found[split].reader.samples)
            pixels = np.stack([*pool.map(_read_pixels, paths, [size] * len(paths))])
            tensors += [torch.from_numpy(pixels), torch.tensor(labels)]
    return Images(*(tensor.to(device) for tensor in tensors))


def views(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """The papers' crop and flip: windows (B, 32, 32, 3) of images (B, 40, 40, 3), mirrored where `flip` (B,) says so.

    `top` and `left` (B,) are a window's first row and column, 0 to 8.
    """
    place = torch.arange(32, device=images.device)
    rows = top[:, None] + place
    columns = left[:, None] + torch.where(flip[:, None], 31 - place, place)
    batch = torch.arange(len(images), device=images.device)
    return images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def _normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images (B, 32, 32, 3) as a network takes them: (B, 3, 32, 32), channels_last."""
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def _loss(model: nn.Module, images: Tensor, labels: Tensor, view: List[Tensor], mean: Tensor, std: Tensor, amp: bool):
    """The loss of a batch. The network is an argument, so that one compilation serves all of a kind."""
    x = _normalise(views(images, *view), mean, std)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        return nn.functional.cross_entropy(model(x), labels)


class Network:
    """A run in training: its network, optimizer and data, all on the images' device.

    It goes on from the checkpoint in `folder`, if there is one; a UserError if it can't. `compiled` is whether forward
    and backward are compiled, which takes half a minute to a minute for each kind of network.
    """

    def __init__(self, run: Run, images: Images, folder: Path, compiled: bool) -> None:
        self.run, self.images, self.recipe = run, images, run.recipe
        self.path = folder / 'last.pth.tar'  # the name, and the format, of train.py's
        self.device = images.train.device
        self.updates_per_epoch = len(images.train) // self.recipe['batch_size']  # train.py's loader drops the rest, too
        if self.updates_per_epoch == 0:
            raise UserError(f'{len(images.train)} training images are fewer than the batch size of the recipe')
        rates = learning_rates(self.recipe, self.updates_per_epoch)
        self.total, self.done, self.seconds = len(rates), 0, 0.0
        self.versions: Dict[str, List[str]] = {}

        random_seed(run.seed)  # as train.py: a seed gives the same weights by both
        model = timm.create_model(run.row.model, num_classes=CLASSES[run.dataset], **run.row.kwargs)
        config = resolve_data_config(self.recipe, model=model)
        self.model = model.to(self.device, memory_format=torch.channels_last).train()
        self.mean, self.std = (255 * torch.tensor(config[key], device=self.device) for key in ('mean', 'std'))
        self.amp = bool(self.recipe.get('amp'))
        self.loss_function = _loss
        if compiled:
            torch._dynamo.config.recompile_limit = 256  # a compilation for each kind
            self.loss_function = torch.compile(_loss, fullgraph=True)

        self.parameters = list(self.model.parameters())
        self.optimizer = _optimizer(self.model, self.recipe, fused=True)
        for parameter in self.parameters:  # as if a gradient of 0 had come before the first one
            self.optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        self.rate = torch.tensor(rates[0], device=self.device)
        for group in self.optimizer.param_groups:
            group['lr'] = self.rate  # fused, SGD reads it on the device
        self.rates = torch.tensor(rates, device=self.device)
        self.losses = torch.zeros(self.total // self.updates_per_epoch, device=self.device)  # sums over the updates
        self.update = torch.zeros(1, dtype=torch.long, device=self.device)  # `done`, for the device
        shape = self.updates_per_epoch, self.recipe['batch_size']
        self.order, self.top, self.left = torch.zeros(3, *shape, dtype=torch.long, device=self.device)
        self.flip = torch.zeros(shape, dtype=torch.bool, device=self.device)

        self.stream, self.advance = None, self._step
        if self.device.type == 'cuda':
            start = copy.deepcopy(self._state())
            self.stream, self.advance = self._capture()
            self._restore(start)
        if self.path.exists():
            try:
                with torch.serialization.safe_globals([argparse.Namespace]):
                    self._restore(torch.load(self.path, map_location='cpu', weights_only=True))
            except Exception as error:  # whatever torch stumbles over in a file that is damaged, or of another network
                told = f'{self.path}: cannot be gone on with ({reason(error)})'
                raise UserError(f'{told}; restore it, or remove it to start over') from error
        if self.stream:
            torch.cuda.synchronize()  # before the network's own stream goes on with it

    def _state(self) -> Dict[str, Any]:
        state = self.optimizer.state
        momenta = {name: state[p]['momentum_buffer'] for name, p in self.model.named_parameters()}
        progress = {'losses': self.losses, 'update': self.done, 'seconds': self.seconds, 'versions': self.versions}
        return {'state_dict': self.model.state_dict(), 'momenta': momenta, **progress}

    def _restore(self, state: Dict[str, Any]) -> None:
        self.model.load_state_dict(state['state_dict'])
        for name, momentum in self._state()['momenta'].items():
            momentum.copy_(state['momenta'][name])
        self.losses.copy_(state['losses'])
        self.done, self.seconds, self.versions = state['update'], state['seconds'], state['versions']
        self.update.fill_(self.done)
        if self.done % self.updates_per_epoch:
            self.draw_views()

    def _capture(self) -> Tuple[torch.cuda.Stream, Callable[[], None]]:
        """A stream, and what runs an update on it as a CUDA graph."""
        torch.backends.cudnn.benchmark = True
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        with torch.cuda.graph(graph, stream=stream):  # which waits for all streams first
            self._step()
        return stream, graph.replay

    def _step(self) -> None:
        position = self.update % self.updates_per_epoch
        chosen, *view = (x.index_select(0, position)[0] for x in (self.order, self.top, self.left, self.flip))
        images, labels = self.images.train[chosen], self.images.train_labels[chosen]
        loss = self.loss_function(self.model, images, labels, view, self.mean, self.std, self.amp)
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters)):
            parameter.grad = gradient
        self.rate.copy_(self.rates.index_select(0, self.update)[0])
        self.optimizer.step()
        self.losses.index_add_(0, self.update // self.updates_per_epoch, loss.detach()[None])
        self.update += 1

    def draw_views(self) -> None:
        """Draws the order, crops and flips of the epoch that the next update is in."""
        random, shape = np.random.default_rng([self.run.seed, self.done // self.updates_per_epoch]), self.order.shape
        order = random.permutation(len(self.images.train))[: self.order.numel()]
        self.order.copy_(torch.from_numpy(order.reshape(shape)))
        self.top.copy_(torch.from_numpy(random.integers(0, 9, shape)))
        self.left.copy_(torch.from_numpy(random.integers(0, 9, shape)))
        self.flip.copy_(torch.from_numpy(random.random(shape) < self.recipe['hflip']))

    def step(self) -> None:
        """An update; on a GPU it may still be running afterwards."""
        with torch.cuda.stream(self.stream):
            if self.done % self.updates_per_epoch == 0:
                self.draw_views()
            self.advance()
        self.done += 1

    def loss(self) -> float:
        """Mean over the updates of the epoch that the last update was in."""
        epoch, position = divmod(max(self.done - 1, 0), self.updates_per_epoch)
        return self.losses[epoch].item() / (position + 1)

    def save(self, versions: Dict[str, str]) -> None:
        """Write the checkpoint: train.py's, with what this engine needs beside it; a UserError if training diverged."""
        if self.stream:
            torch.cuda.synchronize()
        if not math.isfinite(loss := self.loss()):
            where = f'{self.path.parent}, and remove it to start over'
            raise UserError(f'the training diverged (loss {loss}, update {self.done}) and makes no row; see {where}')
        for key, version in versions.items():
            self.versions[key] = list(dict.fromkeys([*self.versions.get(key, []), version]))
        run, args = self.run, _options(self.recipe)
        args.model, args.model_kwargs = run.row.model, run.row.kwargs
        args.seed, args.num_classes = run.seed, CLASSES[run.dataset]
        args.input_size, args.crop_pct = [3, SIZE, SIZE], 1.0  # whatever the network was made for
        epoch = self.done // self.updates_per_epoch - 1  # the last complete one, counted from 0
        checkpoint = {**self._state(), 'epoch': epoch, 'arch': run.row.model, 'args': args}
        file = io.BytesIO()  # torch's own writer makes a RuntimeError of a full disk
        torch.save(checkpoint, file)
        with replacing(self.path) as new:
            new.write_bytes(file.getbuffer())

    @torch.no_grad()
    def result(self) -> Dict[str, Any]:
        """Columns of the run's row: what is measured, on all test images in the precision of the training."""
        self.model.eval()
        outputs = []
        for batch in self.images.test.split(500):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                outputs.append(self.model(_normalise(batch, self.mean, self.std)).float())
        top1, top5 = (round(x.item(), 3) for x in accuracy(torch.cat(outputs), self.images.test_labels, (1, 5)))
        figures = {'top1': top1, 'top5': top5, 'train_loss': round(self.loss(), 5), 'seconds': round(self.seconds)}
        return {**figures, **{key: ' and '.join(versions) for key, versions in self.versions.items()}}


def train(
    runs: Dict[Run, Path], images: Images, versions: Dict[str, str], attempt: Callable, stop: float, compiled: bool
) -> Iterator[Tuple[Run, Dict[str, Any]]]:
    """Trains runs at once until `time.monotonic()` is `stop`, and saves each at least once a minute in its folder.

    It yields those that are through, with columns of their rows. What may fail for one run is in a `with attempt(run)`.
    """
    networks: List[Network] = []
    for run, folder in runs.items():
        with attempt(run):
            network = Network(run, images, folder, compiled)
            print(f'{run}: {f"goes on after update {network.done}" if network.done else "starts"}', flush=True)
            networks.append(network)
    saved, updates = time.monotonic(), 0
    while networks:
        for network in networks:
            if network.done < network.total:
                network.step()
                updates += 1
        now = time.monotonic()
        if now < min(stop, saved + SAVE_SECONDS) and all(network.done < network.total for network in networks):
            continue
        for network in [*networks]:
            networks.remove(network)  # what fails frees its memory
            with attempt(network.run):
                network.seconds += now - saved
                network.save(versions)
                if network.done < network.total:
                    networks.append(network)
                else:
                    yield network.run, network.result()
        if networks:
            pace = updates / (time.monotonic() - saved)
            minutes = sum(network.total - network.done for network in networks) / pace / 60
            for network in networks:
                epoch = f'{network.done / network.updates_per_epoch:.1f} of {len(network.losses)}'
                print(f'{network.run}: epoch {epoch}, loss {network.loss():.4f}')
            print(f'{pace * networks[0].recipe["batch_size"]:.0f} images/s, {minutes:.0f} min left', flush=True)
        saved, updates = time.monotonic(), 0
        if now >= stop:
            return
