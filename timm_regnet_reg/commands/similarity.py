"""Measure how alike the outputs of neighbouring residual blocks are.

    regnet-reg similarity cifar_resnet20 regnet_reg_resnet20_convlstm.cifar10_stage3 --data-dir DIR

The papers' figure 1 in numbers, for any of timm's ResNets, plain or regulated. All are shown the same images, a random
choice from DIR/validation, prepared as each model's config says. Two blocks' outputs are compared by

    linear CKA         for all pairs: 1 if one is the other rotated, scaled and shifted, about 0 if independent
    cosine similarity  for pairs in a stage, which are of one shape: averaged over the images

Linear CKA of outputs X and Y is the sum over batches of HSIC(XX', YY') divided by the root of the sum of HSIC(XX', XX')
and of that of HSIC(YY', YY'). HSIC is the unbiased estimate, so that the size of the batches makes no bias (Kornblith
et al., arXiv 1905.00414; for batches Nguyen et al., arXiv 2010.15327; HSIC: Song et al., JMLR 13, 2012, equation 5).

Prints the means over neighbours, a block and the next one of its stage, and draws all values in similarity.png.
"""

import argparse
import math
import random
import re
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import create_transform, resolve_data_config
from timm.models import ResNet
from torch import Tensor, nn
from tqdm import tqdm

from ..arguments import add_data, add_device, positive
from ..errors import UserError
from ..papers import output
from ..weights.files import check_writable, replacing
from ..weights.inference import find_images, load_model
from ..weights.scoring import image_mode, read_image, split_folder

CKA, COSINE = 'linear CKA', 'cosine similarity'
BATCH_SIZE = 64
LEAST = 4  # images in a batch: below, the unbiased HSIC has no value


def _stage(block: str) -> str:
    return block.partition('.')[0]


class Similarity(NamedTuple):
    """How alike a network's blocks are."""

    blocks: List[str]  # 'layer1.0', …
    values: Dict[str, Tensor]  # of each measure, (blocks, blocks), float64, NaN where it isn't defined

    def neighbours(self, measure: str, stage: str = '') -> float:
        """The mean of a measure over neighbours, in one stage, 'layer1', say, or in all; NaN if there are none."""
        pairs = zip(self.blocks, self.blocks[1:], self.values[measure].diagonal(1).tolist())
        values = [value for a, b, value in pairs if _stage(a) == _stage(b) and a.startswith(stage)]
        return sum(values) / len(values) if values else math.nan


def _centered_gram(X: Tensor) -> Tensor:
    """The Gram matrix of X (n, features), centred so that HSIC of two is `(K * L).sum() / (n * (n - 3))`."""
    # by Székely and Rizzo's U-centring (Annals of Statistics 42, 2014)
    X = X - X.mean(0)  # changes nothing but the rounding
    K = (X @ X.T).cpu().double().fill_diagonal_(0)
    n = len(K)
    means = K.sum(0) / (n - 2)
    return (K - means - means[:, None] + means.sum() / (n - 1)).fill_diagonal_(0)


@torch.inference_mode()
def similarity(model: ResNet, batches: Iterable[Tensor]) -> Similarity:
    """Compares the outputs of the residual blocks of a ResNet of timm, plain or regulated, in evaluation mode.

    `batches` are images (n, channels, height, width) as it takes them, n at least 4 and about the same for all.
    At a time, memory holds the outputs of one stage for one batch. A UserError if an output isn't finite, or is the
    same for all images of a batch.
    """
    blocks = {name: module for name, module in model.named_modules() if re.fullmatch(r'layer\d\.\d+', name)}
    names, stages = list(blocks), [_stage(name) for name in blocks]
    hsic, cosine = torch.zeros(2, len(blocks), len(blocks), dtype=torch.float64)
    grams: List[Tensor] = []  # of the blocks so far
    units: List[Tensor] = []  # outputs of the blocks so far in the stage, of unit length
    seen = 0

    def read(block: nn.Module, inputs: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output  # a regulated block hands on its state as well
        index, x = len(grams), x.flatten(1)
        if not x.isfinite().all() or (x == x[0]).all():
            told = f'infinities, NaN or the same for all of {len(x)} images'
            raise UserError(f'{names[index]} gives {told}; give a model that works')
        grams.append(_centered_gram(x))
        first = stages.index(stages[index])
        if index == first:
            units.clear()
        units.append(F.normalize(x))
        for row, unit in enumerate(units, start=first):
            cosine[row, index] += torch.einsum('nf,nf->n', unit, units[-1]).sum().cpu()

    hooks = [block.register_forward_hook(read) for block in blocks.values()]
    try:
        for images in batches:
            model(images)
            n = len(images)
            seen += n
            G = torch.stack(grams).flatten(1)
            hsic += G @ G.T / (n * (n - 3))
            grams.clear()
    finally:
        for hook in hooks:
            hook.remove()
    scale = hsic.diagonal().sqrt()
    other_stage = torch.tensor([[a != b for b in stages] for a in stages])
    values = {
        CKA: hsic / scale / scale[:, None],
        COSINE: ((cosine + cosine.triu(1).T) / seen).masked_fill(other_stage, math.nan),
    }
    return Similarity(names, values)


def _table(measure: str, results: Dict[str, Similarity]) -> List[str]:
    """A Markdown table: for every model the means over neighbours, of all stages and of each."""
    stages = list(dict.fromkeys(_stage(block) for result in results.values() for block in result.blocks))
    lines = output.header([f'{measure} of neighbours', 'all stages', *stages])
    for name, result in results.items():
        means = [result.neighbours(measure, stage) for stage in ['', *stages]]
        lines.append(output.row([name, *('' if math.isnan(mean) else f'{mean:.3f}' for mean in means)]))
    return lines


def _plot(path: Path, results: Dict[str, Similarity]) -> None:
    """Heat maps of all pairs, a column a model and a row a measure."""
    from matplotlib.figure import Figure

    side = max(4.0, 0.42 * max(len(result.blocks) for result in results.values()))
    figure = Figure(figsize=(side * len(results) + 1, 2 * side + 1), layout='constrained')
    grid = figure.subplots(2, len(results), squeeze=False)
    last_parts = [Path(name).name for name in results]
    labels = [part if last_parts.count(part) == 1 else name for name, part in zip(results, last_parts)]
    for row, measure in zip(grid, (CKA, COSINE)):
        for axes, label, result in zip(row, labels, results.values()):
            values, blocks = result.values[measure].numpy(), result.blocks
            image = axes.imshow(values, vmin=0, vmax=1, cmap='viridis')
            axes.set_title(f'{label}\n{measure}, neighbours {result.neighbours(measure):.3f}', fontsize=10)
            axes.set_xticks(range(len(blocks)), blocks, rotation=90, fontsize=8)
            axes.set_yticks(range(len(blocks)), blocks, fontsize=8)
            for (i, j), value in np.ndenumerate(values):
                if not math.isnan(value):
                    color = 'black' if value > 0.6 else 'white'
                    axes.text(j, i, f'{value:.2f}', color=color, fontsize=6, ha='center', va='center')
        figure.colorbar(image, ax=row, label=measure, shrink=0.8)
    figure.savefig(path, dpi=150, format='png')


def _batches(model: ResNet, batches: List[List[str]], device: str, name: str) -> Iterator[Tensor]:
    """The images of the files, batch by batch, as the model takes them."""
    config = resolve_data_config(model=model)
    transform, mode = create_transform(**config, is_training=False), image_mode(config)
    for paths in tqdm(batches, desc=name, unit='batch', leave=False, disable=None):
        yield torch.stack([transform(read_image(path, mode)) for path in paths]).to(device)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = 'a ResNet of timm, hf-hub:OWNER/NAME, local-dir:FOLDER'
    parser.add_argument('models', metavar='MODEL', nargs='+', help=kinds)
    add_data(parser)
    number = f'how many, at most: a random choice, the same every time; {LEAST} or more (default: %(default)s)'
    parser.add_argument('--images', type=positive, default=512, metavar='N', help=number)
    add_device(parser)
    parser.add_argument('--output', default='.', metavar='DIR', help='where the figure goes (default: here)')


def main(args: argparse.Namespace) -> None:
    """Measure `args.models` on the same images, print the means, draw the values."""
    output.check_matplotlib()
    figure = Path(args.output, 'similarity.png')
    check_writable(figure)
    root = split_folder(args.data_dir, args.split)
    paths = find_images([str(root)])
    sample = random.Random(0).sample(paths, min(args.images, len(paths)))
    if len(sample) < LEAST:
        raise UserError(f'{len(sample)} of the {len(paths)} images of {root}: give {LEAST} or more')
    parts = math.ceil(len(sample) / BATCH_SIZE)
    batches = [sample[i::parts] for i in range(parts)]
    models = {name: load_model(name, args.device) for name in args.models}
    for name, model in models.items():
        if not isinstance(model, ResNet):
            raise UserError(f'{name}: is a {type(model).__name__}; expected a timm.models.ResNet, plain or regulated')
    results = {name: similarity(m, _batches(m, batches, args.device, name)) for name, m in models.items()}
    print(f'{len(sample)} images of {root}', *_table(CKA, results), '', *_table(COSINE, results), sep='\n')
    with replacing(figure) as new:
        _plot(new, results)
