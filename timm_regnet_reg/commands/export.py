"""Export a network to ONNX, and quantise it to int8.

    regnet-reg export net.onnx
    regnet-reg export net.onnx --model local-dir:FOLDER --int8 DIR

The network is reparameterised first (by timm's reparameterize_model). The file takes `images` (batch, channels, height,
width) in batches of any size, in the image size of the model's config and normalised as it says, and gives `logits`. It
is run in ONNX Runtime and compared with the PyTorch model before it is kept, all on the CPU.

With --int8, net.int8.onnx is written beside net.onnx: quantised by ONNX Runtime, calibrated on 512 images of
DIR/train/<class>/<image>, without the border that `regnet-reg cifar` gives them. Both files are scored on
DIR/validation/<class>/<image>.
"""

import argparse
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterable, Tuple

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.utils import reparameterize_model
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..arguments import add_model
from ..errors import UserError
from ..papers.cifar import BORDER, SIZE, SIZES
from ..weights.files import check_writable, replacing
from ..weights.inference import load_model
from ..weights.scoring import ImageFolder, check_finite, check_same_classes, score

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
OPSET = 18  # the one that torch's exporter writes; others are converted from it
TOLERANCE = 1e-4
CALIBRATION_IMAGES = 512


class OnnxModel(nn.Module):
    """An ONNX file as a model: images (B, C, height, width) to logits (B, num_classes), by ONNX Runtime on the CPU."""

    def __init__(self, path) -> None:
        super().__init__()
        from onnxruntime import InferenceSession

        self.session = InferenceSession(str(path), providers=['CPUExecutionProvider'])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(['logits'], {'images': images.numpy()})[0])


def export_onnx(model: nn.Module, path) -> None:
    """Write a timm network in evaluation mode, on the CPU, as one ONNX file for batches of any size."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # inside another module, as reparameterize_model asks everything but the module that it is given
    model = reparameterize_model(nn.Sequential(model))[0].eval()
    images = torch.zeros(2, *resolve_data_config(model=model)['input_size'])  # 1 would be taken for a constant
    told: Dict[str, Any] = dict(input_names=['images'], output_names=['logits'], dynamic_shapes=({0: 'batch'},))
    program = torch.onnx.export(model, (images,), opset_version=OPSET, verbose=False, **told)
    assert program is not None  # as it is with the exporter of today
    ClearMetadataAndDocStringPass()(program.model)  # each node's stack trace, with this machine's paths
    program.save(path, external_data=False)


def largest_difference(model: nn.Module, path) -> float:
    """The largest difference of an ONNX file's logits from the model's on random images, over the largest logit."""
    onnx_model, generator = OnnxModel(path), torch.Generator().manual_seed(0)
    differences = []
    for batch_size in (1, 3):
        images = torch.randn(batch_size, *resolve_data_config(model=model)['input_size'], generator=generator)
        with torch.inference_mode():
            expected, actual = model(images), onnx_model(images)
        check_finite(expected, 'the PyTorch model')
        check_finite(actual, path)
        differences.append(((actual - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


def quantize(source, target, images: Iterable[torch.Tensor]) -> None:
    """Quantise an ONNX file of `export_onnx` to int8, convolutions and the classifier, weights by channel.

    The regulators' convolutions, and all others with groups, stay as they are: they hold few weights, are no faster
    in int8, and the state that passes through them again and again would gather their errors.

    Activations are quantised to the ranges that they have on the batches of images (B, C, height, width).
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = ({'images': batch.numpy()} for batch in images)
    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    convolutions = [node for node in onnx.load(target).graph.node if node.op_type == 'Conv']
    grouped = [node.name for node in convolutions if any(a.name == 'group' and a.i > 1 for a in node.attribute)]
    quantize_static(
        str(target),
        str(target),
        SimpleNamespace(get_next=lambda: next(batches, None)),
        op_types_to_quantize=['Conv', 'Gemm'],
        nodes_to_exclude=grouped,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        reduce_range=True,  # to 7 bits, whose products don't overflow on x86 processors without VNNI
    )


def _images(data_dir: str, model: nn.Module, data_config: Dict[str, Any]) -> Tuple[Subset, ImageFolder]:
    """Random training images to calibrate on, and those to score on, of the same classes as the model's."""
    transform = create_transform(**data_config)

    def as_used(image: Image.Image) -> torch.Tensor:  # without the border that CIFAR's are cut from
        bordered = image.size == (SIZES['train'],) * 2 and data_config['input_size'][1] == SIZE
        return transform(ImageOps.crop(image, BORDER) if bordered else image)

    training = ImageFolder(Path(data_dir, 'train'), data_config, model.num_classes, transform=as_used)
    validation = ImageFolder(Path(data_dir, 'validation'), data_config, model.num_classes)
    check_same_classes(validation, training.label_names, training.reader.root)
    check_same_classes(validation, model.pretrained_cfg.get('label_names') or [], 'the model')
    chosen = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    return Subset(training, chosen.tolist()), validation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('output', metavar='OUTPUT', help='the file to write, *.onnx')
    add_model(parser)
    parser.add_argument('--int8', metavar='DIR', help='write *.int8.onnx, too, with the images in DIR')


def main(args: argparse.Namespace) -> None:
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f'{" and ".join(missing)}: not installed; pip install "timm-regnet-reg[export]"')
    output = Path(args.output)
    if output.suffix != '.onnx':
        raise UserError(f'{output}: expected a file name that ends in .onnx')
    check_writable(output)
    model = load_model(args.model)
    data_config = resolve_data_config(model=model)
    if args.int8 is not None:
        quantized = output.with_suffix('.int8.onnx')
        check_writable(quantized)
        calibration, validation = _images(args.int8, model, data_config)

    with replacing(output) as file:
        export_onnx(model, file)
        difference = largest_difference(model, file)
        if not difference <= TOLERANCE:
            told = f'differs from the PyTorch model by {difference:.1e} of the largest output, more than {TOLERANCE}'
            raise UserError(f'--model {args.model}: the exported network {told}, so the file was not kept')
    batch = ' x '.join(map(str, ('batch', *data_config['input_size'])))
    told = f"its outputs in ONNX Runtime differ from PyTorch's by at most {difference:.1e} of the largest"
    print(f'{output}: ONNX opset {OPSET}, images {batch}; {told}')
    if args.int8 is None:
        return
    full = score(OnnxModel(output), validation, data_config, desc='scoring float32')
    with replacing(quantized) as file:
        loader = DataLoader(calibration, batch_size=32)
        with redirect_stdout(sys.stderr), tqdm(loader, desc='calibrating', unit='batch') as batches:
            quantize(output, file, (images for images, _ in batches))
        int8 = score(OnnxModel(file), validation, data_config, desc='scoring int8')
    for path, result in ((output, full), (quantized, int8)):
        accuracy = f'top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % on {result.images:,} images'
        print(f'{path}: {accuracy}, {path.stat().st_size / 1e6:.2f} MB')
