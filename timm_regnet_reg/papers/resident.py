"""Trains CIFAR networks with all images on the device, several networks at once on a GPU.

A recipe of `train_recipes/` is read as timm's train.py reads it: timm's own functions make the network, the optimizer
and the schedule of it, and what this engine doesn't do is refused by name. An update is views, forward, backward and
SGD; on a GPU all of it is one CUDA graph, with a stream for each network. An epoch's order, crops and flips follow from
the run's seed and the epoch alone, so that a run goes on exactly where it was saved, on another device too.
"""

import argparse
import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import resolve_data_config
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import accuracy, random_seed
from torch import Tensor, nn

from ..errors import UserError, reason
from ..weights.files import replacing
from .results import Row, Run

__all__ = ['Images', 'Network', 'check_recipe', 'create_optimizer', 'learning_rates', 'read_images', 'train', 'views']

# what may be the matter with one run; others go on
TROUBLE = (UserError, OSError, MemoryError, torch.OutOfMemoryError)

CHECKPOINT = 'last.pth.tar'  # train.py's name, and its format: `regnet-reg package` takes either
SAVE_SECONDS = 30

# keys of a recipe: those that must be there, those that may be, and those whose value must be what the engine does
NEEDED = {'batch_size', 'lr_base', 'lr_base_size', 'opt', 'momentum', 'weight_decay', 'epochs', 'sched', 'hflip'}
KNOWN = {
    *('opt_kwargs', 'sched_on_updates', 'decay_milestones', 'decay_rate', 'warmup_epochs', 'warmup_lr'),
    *('warmup_prefix', 'min_lr', 'num_classes', 'mean', 'std', 'amp', 'amp_dtype'),
    *('device_modules', 'train_interpolation'),  # our models are registered, and no view is resized
}
FIXED: Dict[str, Tuple[Any, ...]] = {
    'opt': ('sgd', 'momentum', 'nesterov'),
    'sched': ('multistep', 'cosine'),
    'amp_dtype': ('bfloat16',),
    'channels_last': (True,),
    'scale': ([0.64, 0.64],),  # windows of 32x32 of 40x40
    'ratio': ([1.0, 1.0],),
    'color_jitter': (0.0,),
    'smoothing': (0.0,),
}


def check_recipe(recipe: Dict[str, Any]) -> None:
    """Raises a UserError that names what this engine can't do of a recipe."""
    wrong = [f'{key}: {value!r}' for key, value in recipe.items() if key not in NEEDED | KNOWN | FIXED.keys()]
    wrong += [f'{key}: {recipe[key]!r}' for key in FIXED if key in recipe and recipe[key] not in FIXED[key]]
    missing = {*NEEDED, *FIXED, *(['decay_milestones'] if recipe.get('sched') == 'multistep' else [])} - {'amp_dtype'}
    wrong += [f'no {key}' for key in sorted(missing - recipe.keys())]
    if wrong:
        raise UserError(f"the recipe has {', '.join(wrong)}, which needs timm's train.py; give its path, too")


def _options(recipe: Dict[str, Any]) -> argparse.Namespace:
    """The recipe as timm's functions want it, with the learning rate that train.py makes of it."""
    return argparse.Namespace(lr=recipe['lr_base'] * recipe['batch_size'] / recipe['lr_base_size'], **recipe)


def create_optimizer(model: nn.Module, recipe: Dict[str, Any], **kwargs: Any) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, **optimizer_kwargs(_options(recipe)), **recipe.get('opt_kwargs', {}), **kwargs)


def learning_rates(recipe: Dict[str, Any], updates_per_epoch: int) -> List[float]:
    """The learning rate of every update of a training."""
    optimizer = create_optimizer(nn.Linear(1, 1), recipe)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(_options(recipe)), updates_per_epoch=updates_per_epoch
    )
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

    def to(self, device: torch.device) -> 'Images':
        return Images(*(tensor.to(device) for tensor in self))


def _read_folder(folder: Path, size: int) -> Tuple[Tensor, Tensor]:
    def read(path: str) -> np.ndarray:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert('RGB'))
        except Exception as error:  # decoders raise whatever they stumble over in a damaged file
            raise UserError(f'{path}: cannot be read as an image ({reason(error)}); get it again') from error
        if pixels.shape != (size, size, 3):
            raise UserError(f'{path}: is {pixels.shape[1]}x{pixels.shape[0]}, expected {size}x{size}')
        return pixels

    samples, _ = find_images_and_targets(str(folder))
    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(read, (path for path, _ in samples), chunksize=100)))
    return torch.from_numpy(pixels), torch.tensor([label for _, label in samples])


def read_images(folder: str) -> Images:
    """All images of a folder that `regnet-reg cifar` wrote.

    Raises:
        UserError: An image is damaged or of another size.
    """
    return Images(*_read_folder(Path(folder, 'train'), 40), *_read_folder(Path(folder, 'validation'), 32))


def views(images: Tensor, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """The papers' crop and flip.

    Args:
        images: (B, 40, 40, 3).
        top: (B,), the window's first row, 0 to 8.
        left: (B,), its first column.
        flip: (B,), whether it is mirrored.

    Returns:
        (B, 32, 32, 3), of the images' type.
    """
    place = torch.arange(32, device=images.device)
    rows = top[:, None] + place
    columns = left[:, None] + torch.where(flip[:, None], 31 - place, place)
    batch = torch.arange(len(images), device=images.device)
    return images[batch[:, None, None], rows[:, :, None], columns[:, None, :]]


def _loss_function(template: nn.Module, mean: Tensor, std: Tensor, amp: bool) -> Callable[..., Tensor]:
    """The loss of a batch by tensors: one function, and one compilation, for all networks of a kind."""
    names = [name for name, _ in template.named_parameters()]
    buffer_names = [name for name, _ in template.named_buffers()]

    def loss(parameters, buffers, images, labels, top, left, flip):
        x = ((views(images, top, left, flip).float() - mean) / std).permute(0, 3, 1, 2)  # channels_last
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            tensors = {**dict(zip(names, parameters)), **dict(zip(buffer_names, buffers))}
            return F.cross_entropy(torch.func.functional_call(template, tensors, (x,)), labels)

    return loss


class Network:
    """A run in training: its network, optimizer and data, all on one device, and the updates done.

    Args:
        run: The run.
        images: On the device.
        folder: Of its checkpoint. If there is one, the run goes on from it.
        compiled: Compile the update (minutes at the start, less time for each update).
        like: A network of the same model and arguments, whose compiled function serves this one, too.

    Raises:
        UserError: The checkpoint is of other settings, or can't be loaded.
    """

    def __init__(self, run: Run, images: Images, folder: Path, compiled: bool, like: Optional['Network'] = None):
        self.run, self.images, self.path = run, images, folder / CHECKPOINT
        device = self.device = images.train.device
        recipe = run.recipe
        self.batch_size = recipe['batch_size']
        self.updates_per_epoch = len(images.train) // self.batch_size  # as train.py's loader drops the rest
        rates = learning_rates(recipe, self.updates_per_epoch)
        self.total = len(rates)
        random_seed(run.seed)  # as train.py: a seed gives the same weights by both
        model = timm.create_model(run.row.model, num_classes=run.classes, **run.row.kwargs)
        config = resolve_data_config(recipe, model=model)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.mean, self.std = (255 * torch.tensor(config[key], device=device) for key in ('mean', 'std'))
        self.amp = bool(recipe.get('amp'))
        self.parameters = list(self.model.parameters())
        self.buffers = list(self.model.buffers())
        self.optimizer = create_optimizer(self.model, recipe, fused=True)
        self.rate = torch.tensor(rates[0], device=device)
        for group in self.optimizer.param_groups:
            group['lr'] = self.rate  # of which the fused SGD takes the value on the device
        for parameter in self.parameters:  # as if there had been a gradient of 0 before the first one
            self.optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)

        self.rates = torch.tensor(rates, device=device)
        self.losses = torch.zeros(self.total // self.updates_per_epoch, device=device)  # sums over an epoch's updates
        self.update = torch.zeros(1, dtype=torch.long, device=device)
        shape = self.updates_per_epoch, self.batch_size
        self.order, self.top, self.left = torch.zeros(3, *shape, dtype=torch.long, device=device)
        self.flip = torch.zeros(shape, dtype=torch.bool, device=device)

        if like is None:
            self.loss_function = _loss_function(self.model, self.mean, self.std, self.amp)
            if compiled:
                self.loss_function = torch.compile(self.loss_function, fullgraph=True)
        else:
            self.loss_function = like.loss_function
        self.done, self.seconds = 0, 0.0
        self.versions: Dict[str, List[str]] = {}
        checkpoint = self._read() if self.path.exists() else None
        if device.type == 'cuda':
            fresh = copy.deepcopy(self.model.state_dict())
            self._capture()
            self.model.load_state_dict(fresh)
            for tensor in (self.losses, self.update, *self._momenta().values()):
                tensor.zero_()
        if checkpoint is not None:
            self._load(checkpoint)

    def _momenta(self) -> Dict[str, Tensor]:
        state = self.optimizer.state
        return {name: state[parameter]['momentum_buffer'] for name, parameter in self.model.named_parameters()}

    def _capture(self) -> None:
        self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self._step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self._step()
        torch.cuda.synchronize()

    def _step(self) -> None:
        position = self.update % self.updates_per_epoch
        chosen, top, left, flip = (x.index_select(0, position)[0] for x in (self.order, self.top, self.left, self.flip))
        batch, labels = self.images.train[chosen], self.images.train_labels[chosen]
        loss = self.loss_function(self.parameters, self.buffers, batch, labels, top, left, flip)
        for parameter, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters)):
            parameter.grad = gradient
        self.rate.copy_(self.rates.index_select(0, self.update)[0])
        self.optimizer.step()
        self.losses.index_add_(0, self.update // self.updates_per_epoch, loss.detach()[None])
        self.update += 1

    def draw_views(self, epoch: int) -> None:
        """Draws an epoch's order, crops and flips."""
        random = np.random.default_rng([self.run.seed, epoch])
        order = random.permutation(len(self.images.train))[: self.order.numel()].reshape(self.order.shape)
        self.order.copy_(torch.from_numpy(order))
        for corner in (self.top, self.left):
            corner.copy_(torch.from_numpy(random.integers(0, 9, self.order.shape)))
        self.flip.copy_(torch.from_numpy(random.random(self.order.shape) < self.run.recipe['hflip']))

    def step(self) -> None:
        """An update; on a GPU it may still be running afterwards."""
        epoch, position = divmod(self.done, self.updates_per_epoch)
        if self.device.type == 'cuda':
            with torch.cuda.stream(self.stream):
                if position == 0:
                    self.draw_views(epoch)
                self.graph.replay()
        else:
            if position == 0:
                self.draw_views(epoch)
            self._step()
        self.done += 1

    def mean_loss(self) -> float:
        """Mean over the updates of the epoch that the last update was in."""
        epoch, position = divmod(max(self.done - 1, 0), self.updates_per_epoch)
        return self.losses[epoch].item() / (position + 1)

    def save(self, versions: Dict[str, str]) -> None:
        """Write the checkpoint: train.py's, with what this engine needs beside it.

        Raises:
            UserError: The training has diverged, or nothing can be written.
        """
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        if not math.isfinite(loss := self.mean_loss()):
            raise UserError(
                f'the training diverged (loss {loss} in epoch {(self.done - 1) // self.updates_per_epoch + 1}), and '
                f'makes no row; remove {self.path.parent} to start over'
            )
        for key, version in versions.items():
            if version not in self.versions.setdefault(key, []):
                self.versions[key].append(version)
        args = {**vars(_options(self.run.recipe)), 'model': self.run.row.model, 'model_kwargs': self.run.row.kwargs}
        checkpoint = {
            'epoch': self.done // self.updates_per_epoch - 1,  # the last complete one, counted from 0
            'arch': self.run.row.model,
            'state_dict': self.model.state_dict(),
            'args': argparse.Namespace(**{**args, 'seed': self.run.seed, 'num_classes': self.run.classes}),
            'momenta': self._momenta(),
            'update': self.done,
            'losses': self.losses,
            'seconds': self.seconds,
            'settings': self.run.settings,
            'versions': self.versions,
        }
        with replacing(self.path) as new:
            torch.save(checkpoint, new)

    def _read(self) -> Dict[str, Any]:
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(self.path, map_location='cpu', weights_only=True)
            settings = checkpoint['settings']
        except Exception as error:  # whatever torch stumbles over in a damaged file
            raise UserError(
                f'{self.path}: cannot be read ({reason(error)}); restore it, or remove it to start over'
            ) from error
        if settings != self.run.settings:
            raise UserError(
                f'{self.path}: was begun with another recipe or other images; give another --output, or remove it to '
                'start over'
            )
        return checkpoint

    def _load(self, checkpoint: Dict[str, Any]) -> None:
        try:
            weights = checkpoint['state_dict']
            # momenta pass through the network's load hooks as the weights do, and have their names then
            moved = copy.deepcopy(self.model)
            moved.load_state_dict({**weights, **checkpoint['momenta']})
            self.model.load_state_dict(weights)
        except RuntimeError as error:
            raise UserError(
                f'{self.path}: does not fit this version of {self.run.row.model} ({reason(error)}); go on with the '
                f'version that began it ({", ".join(checkpoint["versions"]["timm_regnet_reg"])}), or start over'
            ) from error
        with torch.no_grad():
            for name, momentum in self._momenta().items():
                momentum.copy_(moved.get_parameter(name))
        self.losses.copy_(checkpoint['losses'])
        self.done, self.seconds, self.versions = (checkpoint[key] for key in ('update', 'seconds', 'versions'))
        self.update.fill_(self.done)
        if self.done % self.updates_per_epoch:
            self.draw_views(self.done // self.updates_per_epoch)

    def result(self) -> Dict[str, Any]:
        """What was measured, with what: columns of the run's row."""
        top1, top5 = self.test()
        return {
            'top1': round(top1, 3),
            'top5': round(top5, 3),
            'train_loss': round(self.mean_loss(), 5),
            'seconds': round(self.seconds),
            **{key: ' and '.join(versions) for key, versions in self.versions.items()},
        }

    @torch.no_grad()
    def test(self) -> Tuple[float, float]:
        """Top-1 and top-5 in percent on the test images, in the precision of the training."""
        self.model.eval()
        outputs = []
        for batch in self.images.test.split(500):
            x = ((batch.float() - self.mean) / self.std).permute(0, 3, 1, 2)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                outputs.append(self.model(x).float())
        self.model.train()
        top1, top5 = accuracy(torch.cat(outputs), self.images.test_labels, (1, 5))
        return top1.item(), top5.item()


def train(
    runs: List[Run],
    images: Images,
    folders: Dict[Run, Path],
    versions: Dict[str, str],
    stop: float = math.inf,
    compiled: bool = False,
) -> Iterator[Tuple[Run, Union[Dict[str, Any], Exception]]]:
    """Trains runs at once, until `time.monotonic()` is `stop`, and saves each at least once a minute.

    Args:
        runs: What to train.
        images: On the device.
        folders: Of each run.
        versions: What the run is trained with.
        stop: When to save and end.
        compiled: Compile the update.

    Yields:
        Every run that is through, with columns of its row, or what went wrong with it.
    """
    networks: List[Network] = []
    kinds: Dict[Row, Network] = {}
    for run in runs:
        try:
            networks.append(Network(run, images, folders[run], compiled, kinds.get(run.row)))
            kinds.setdefault(run.row, networks[-1])
        except TROUBLE as error:
            yield run, error
        else:
            print(
                f'{run}: {f"goes on after update {networks[-1].done}" if networks[-1].done else "starts"}', flush=True
            )
    saved, trained = time.monotonic(), 0
    while networks:
        for network in networks:
            if network.done < network.total:
                network.step()
                trained += network.batch_size
        now = time.monotonic()
        through = [network for network in networks if network.done == network.total]
        if not through and now < min(stop, saved + SAVE_SECONDS):
            continue
        for network in list(networks):
            try:
                network.seconds += time.monotonic() - saved
                network.save(versions)
                if network in through:
                    networks.remove(network)
                    yield network.run, network.result()
            except TROUBLE as error:
                networks.remove(network)
                yield network.run, error
        if networks:
            _report(networks, trained / (time.monotonic() - saved))
        saved, trained = time.monotonic(), 0
        if now >= stop:
            return


def _report(networks: List[Network], rate: float) -> None:
    parts = [
        f'{network.run}: epoch {network.done / network.updates_per_epoch:.1f} of {network.run.recipe["epochs"]}, '
        f'loss {network.mean_loss():.4f}'
        for network in networks
    ]
    left = sum((network.total - network.done) * network.batch_size for network in networks) / rate / 60
    print(f'{"; ".join(parts)}; {rate:.0f} images/s; about {left // 60:.0f} h {left % 60:.0f} min left', flush=True)
