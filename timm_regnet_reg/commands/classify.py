"""Print the most probable classes of images.

    regnet-reg classify photo.jpg holiday/
    regnet-reg classify --model resnet50.a1_in1k --topk 3 --json photo.jpg

A network chooses among the classes that it was trained on, whatever the image shows: the default one knows CIFAR-10's.
Nothing is printed before all images are classified; one that can't be read ends the command.
"""

import argparse
import json

from tqdm import tqdm

from ..arguments import add_device, add_model, positive
from ..weights.inference import find_images, load_model, predict, prediction_lines
from ..weights.scoring import read_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='an image, or a folder of images')
    add_model(parser)
    parser.add_argument('--topk', type=positive, default=5, metavar='K', help='how many classes (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='print one JSON document')
    add_device(parser)


def main(args: argparse.Namespace) -> None:
    paths = find_images(args.images)
    model = load_model(args.model, args.device)
    # on a terminal only, and closed, so that an error starts on a line of its own
    with tqdm(paths, desc='classifying', unit='image', leave=False, disable=None) as progress:
        results = list(zip(paths, predict(model, map(read_image, progress), args.topk)))
    if args.json:
        images = [{'image': path, 'predictions': predictions} for path, predictions in results]
        print(json.dumps({'model': args.model, 'images': images}, indent=2))
    else:
        print('\n'.join(f'{path}\n{prediction_lines(predictions)}' for path, predictions in results))
