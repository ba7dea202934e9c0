"""Classify a photograph, fine-tune on a small image set, save the result and load it back.

    regnet-reg quickstart

A tour for a machine that has never seen this project: it needs no download, and takes less than three minutes on two
cores. The photograph and the images to fine-tune on, handwritten digits, come with scikit-learn. The network that it
trains stays in the folder regnet_reg_resnet20_convlstm.digits, to be used and looked at.
"""

import argparse
import time
from pathlib import Path
from typing import Callable, Tuple

import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from tqdm import tqdm

from ..arguments import DEFAULT_MODEL
from ..errors import UserError
from ..weights.folder import check_replaceable, save_folder
from ..weights.inference import load_model, predict, prediction_lines
from ..weights.scoring import score

PHOTOGRAPH = 'flower.jpg'
NAME = f'{DEFAULT_MODEL}.digits'
EPOCHS = 3
HELD_OUT = 360  # of 1,797 images
LEARNING_RATE = 0.003
SEED = 0


class Digits(list):
    """Pairs of an image and its label; timm's loader sets `transform`, which prepares the image."""

    label_names = [str(digit) for digit in range(10)]
    transform: Callable[[Image.Image], torch.Tensor]

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return self.transform(image), label


def _load_samples() -> Tuple[Image.Image, Digits, Digits]:
    """scikit-learn's photograph, and its digits for training and for evaluation."""
    try:
        from sklearn.datasets import load_digits, load_sample_image
    except ImportError as error:
        raise UserError(f'scikit-learn has the images ({error}); pip install "timm-regnet-reg[quickstart]"') from error
    digits = load_digits()
    greys = (digits.images * (255 / 16)).astype('uint8')  # from 0 to 16
    pairs = [(Image.fromarray(grey).convert('RGB'), int(label)) for grey, label in zip(greys, digits.target)]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SEED)).tolist()
    held_out, train = (Digits(pairs[i] for i in part) for part in (order[:HELD_OUT], order[HELD_OUT:]))
    return Image.fromarray(load_sample_image(PHOTOGRAPH)), train, held_out


def _fine_tune(model: nn.Module, loader) -> None:
    optimizer = create_optimizer_v2(model, opt='adamw', lr=LEARNING_RATE, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    model.train()
    with tqdm(total=EPOCHS * len(loader), desc='fine-tuning', unit='batch') as progress:
        for images, labels in (batch for _ in range(EPOCHS) for batch in loader):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
            progress.update()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--output', default='.', metavar='DIR', help=f'where {NAME}/ goes, replacing an earlier one')


def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    photograph, train_set, held_out = _load_samples()
    folder = Path(args.output, NAME).absolute()
    check_replaceable(folder)

    print(f'1/5  Load {DEFAULT_MODEL}, a ResNet-20 regulated by a ConvLSTM, trained on CIFAR-10')
    model = load_model(DEFAULT_MODEL)
    cfg, data_config = model.pretrained_cfg, resolve_data_config(model=model)
    print(f'{sum(p.numel() for p in model.parameters()):,} parameters. The weights came with the package.')

    print(f'\n2/5  Classify a photograph: {PHOTOGRAPH} of scikit-learn, a flower')
    print(prediction_lines(next(predict(model, [photograph], topk=3))))
    print('The network has to choose among the ten classes of CIFAR-10, at 32x32 pixels, and a flower is none of them.')

    print(f'\n3/5  Fine-tune on {len(train_set):,} handwritten digits of scikit-learn, 8x8 pixels enlarged to 32x32')
    torch.manual_seed(SEED)
    model.reset_classifier(len(held_out.label_names))
    # without worker processes, which take longer to start than the images to prepare
    how = dict(num_workers=0, persistent_workers=False, use_prefetcher=False, device=torch.device('cpu'))
    # moved and scaled a little, but never mirrored: a mirrored digit is no digit
    how.update(is_training=True, scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=None)
    train_loader = create_loader(train_set, **data_config, **how, batch_size=32)
    before = score(model, held_out, data_config, workers=0, desc='scoring before')
    _fine_tune(model, train_loader)
    after = score(model, held_out, data_config, workers=0, desc='scoring after')
    print(f'Accuracy on {after.images} held-out digits: {before.top1:.1f} % before (chance), {after.top1:.1f} % after.')

    print(f'\n4/5  Save it: {folder}')
    details = {
        'Started from': f'{DEFAULT_MODEL}.{cfg["tag"]}',
        'Recipe': f'quickstart, {EPOCHS} epochs of AdamW with learning rate {LEARNING_RATE}, cosine schedule',
        'Images trained on': f'{len(train_set):,}',
    }
    data = f"{after.images} held-out images of scikit-learn's handwritten digits"
    save_folder(model, folder, data_config, after, data, cfg['license'], details, '`regnet-reg quickstart`')
    print('config.json, model.safetensors and README.md, the model card: what timm loads and the Hub holds.')

    print("\n5/5  Load it back: timm.create_model('local-dir:…', pretrained=True)")
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    images = torch.stack([held_out.transform(image) for image, _ in held_out])
    with torch.inference_mode():
        if not torch.equal(loaded(images), model(images)):
            raise RuntimeError(f'The network loaded from {folder} is not the one that was saved: its outputs differ')
    print(f'On all {after.images} held-out images the outputs are the same, bit for bit.')
    print(f'\nDone in {time.perf_counter() - start:.0f} s.')
