"""Classify a photograph, fine-tune on a small image set, save the result and load it back.

    regnet-reg quickstart

A tour for a machine that has never seen this project: it needs no download, and takes less than three minutes on two
cores. The photograph and the images to fine-tune on, handwritten digits, come with scikit-learn. The network that it
trains stays in the folder regnet_reg_resnet20_convlstm.digits, to be used and looked at.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

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

__all__ = ['Digits', 'quickstart']

PHOTOGRAPH = 'flower.jpg'
NAME = f'{DEFAULT_MODEL}.digits'
EPOCHS = 3
HELD_OUT = 360  # of 1,797 images
BATCH_SIZE = 32
LEARNING_RATE = 0.003
SEED = 0
# moved and scaled a little, but never mirrored: a mirrored digit is no digit
AUGMENTATION: Dict[str, Any] = dict(scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=None)
INSTALL = 'pip install "timm-regnet-reg[quickstart]"'


class Digits(torch.utils.data.Dataset):
    """Digits as grey values from 0 to 16 (n, 8, 8), and their labels (n,); timm's loader sets `transform`."""

    label_names = [str(digit) for digit in range(10)]

    def __init__(self, images, labels) -> None:
        self.images = [Image.fromarray((image * (255 / 16)).astype('uint8')).convert('RGB') for image in images]
        self.labels = labels.tolist()
        self.transform: Callable[[Image.Image], torch.Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def _load_samples() -> Tuple[Image.Image, Digits, Digits]:
    """scikit-learn's photograph, and its digits for training and for evaluation."""
    try:
        from sklearn.datasets import load_digits, load_sample_image
    except ImportError as error:
        raise UserError(
            f'quickstart takes its images from scikit-learn, which cannot be imported ({error}); {INSTALL}'
        ) from error
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED)).numpy()
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    photograph = Image.fromarray(load_sample_image(PHOTOGRAPH))
    return photograph, Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def _fine_tune(model: nn.Module, loader, epochs: int) -> None:
    optimizer = create_optimizer_v2(model, opt='adamw', lr=LEARNING_RATE, weight_decay=0.05)
    updates = epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    model.train()
    with tqdm(total=updates, desc='fine-tuning', unit='batch') as progress:
        for _ in range(epochs):
            for images, labels in loader:
                loss = nn.functional.cross_entropy(model(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.set_postfix(loss=f'{loss.item():.3f}', refresh=False)
                progress.update()


def _logits(model: nn.Module, images: Digits) -> torch.Tensor:
    """The outputs (number of images, 10); the same input and weights give the same bits on the CPU."""
    with torch.inference_mode():
        return model.eval()(torch.stack([images[i][0] for i in range(len(images))]))


def _say(step: int, headline: str, *lines: str) -> None:
    print(f'\n{step}/5  {headline}', *lines, sep='\n', flush=True)


def quickstart(output, epochs: int = EPOCHS, max_images: Optional[int] = None) -> Path:
    """The tour, with fewer epochs or training images on request; returns the folder of the fine-tuned network.

    Raises:
        UserError: scikit-learn is missing, or the network can't be had, or the folder can't be written.
        RuntimeError: The network that was loaded back is another one than was saved.
    """
    start = time.perf_counter()
    photograph, train_set, held_out = _load_samples()
    train_set.images = train_set.images[:max_images]

    model = load_model(DEFAULT_MODEL)
    cfg = model.pretrained_cfg
    data_config = resolve_data_config(model=model)
    folder = Path(output, NAME)
    check_replaceable(folder)
    _say(
        1,
        f'Load {DEFAULT_MODEL}, a ResNet-20 regulated by a ConvLSTM, trained on CIFAR-10',
        f'{sum(p.numel() for p in model.parameters()):,} parameters. The weights came with the package.',
    )

    _say(
        2,
        f'Classify a photograph: {PHOTOGRAPH} of scikit-learn, a flower',
        prediction_lines(predict(model, [photograph], topk=3)[0]),
        'This is no verdict on the photograph. The network sees it at 32x32 pixels and has to choose among the ten',
        'classes of CIFAR-10 (airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck). A flower is none',
        'of them, and a network can be sure of a wrong answer. `regnet-reg classify` takes photographs of your own.',
    )

    torch.manual_seed(SEED)
    model.reset_classifier(len(held_out.label_names))
    train_loader = create_loader(
        train_set,
        **data_config,
        **AUGMENTATION,
        batch_size=BATCH_SIZE,
        is_training=True,
        num_workers=0,  # these images are prepared faster than worker processes start
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device('cpu'),
    )
    _say(
        3,
        f'Fine-tune on {len(train_set):,} handwritten digits of scikit-learn, 8x8 pixels enlarged to 32x32',
        "A new classifier for ten digits replaces the old one, then all weights train with timm's loader, AdamW",
        f'and a cosine schedule: {epochs} {"epoch" if epochs == 1 else "epochs"} of {len(train_loader)} batches.',
    )
    before = score(model, held_out, data_config, workers=0, desc='scoring before')
    _fine_tune(model, train_loader, epochs)
    after = score(model, held_out, data_config, workers=0, desc='scoring after')
    print(
        f'Accuracy on {after.images} held-out digits: {before.top1:.1f} % before, {after.top1:.1f} % after.\n'
        'Before, the new classifier knew nothing: about 10 % is chance.'
    )

    expected = _logits(model, held_out)
    details = {
        'Started from': f'{DEFAULT_MODEL}.{cfg["tag"]}',
        'Recipe': f'quickstart, AdamW with learning rate {LEARNING_RATE}, cosine schedule',
        'Epochs': epochs,
        'Seed': SEED,
        'Images trained on': f'{len(train_set):,}',
    }
    data = f"{after.images} held-out images of scikit-learn's handwritten digits"
    # what the config says of the CIFAR-10 weights isn't true of these
    cfg.update(label_names=None, label_descriptions=None, description=None)
    save_folder(model, folder, after, data, cfg['license'], details, '`regnet-reg quickstart`', data_config)
    _say(
        4,
        f'Save it: {folder}',
        'config.json, model.safetensors and README.md, the model card: what timm loads and the Hugging Face Hub holds.',
    )

    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    difference = (_logits(loaded, held_out) - expected).abs().max().item()
    if difference != 0:
        raise RuntimeError(
            f'The network loaded from {folder} is not the one that was saved: outputs differ by {difference}'
        )
    _say(
        5,
        "Load it back: timm.create_model('local-dir:…', pretrained=True)",
        f'On all {len(expected)} held-out images the outputs are the same, bit for bit.',
        f'\nDone in {time.perf_counter() - start:.0f} s.',
    )
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    told = f'where {NAME}/ goes; one from an earlier run is replaced (default: here)'
    parser.add_argument('--output', default='.', metavar='DIR', help=told)


def main(args: argparse.Namespace) -> None:
    quickstart(args.output)
