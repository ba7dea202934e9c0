"""Export a network to ONNX, and quantise it to int8.

    regnet-reg export net.onnx
    regnet-reg export net.onnx --model local-dir:FOLDER --int8 DIR

The network is folded first (timm's reparameterize_model). The file takes `images` (batch, channels, height, width) in
batches of any size, in the image size of the model's config and normalised as it says, and gives `logits`. It is run in
ONNX Runtime and compared with the PyTorch model before it is kept.

With --int8, net.int8.onnx is written beside net.onnx: quantised by ONNX Runtime, calibrated on 512 images of
DIR/train/<class>/<image>. Both files are then scored on DIR/validation/<class>/<image>.
"""

import argparse
import os
import sys
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, Tuple

import torch
import torch.nn as nn
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.utils import reparameterize_model
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ..errors import UserError
from ..support.inference import load_model
from ..support.scoring import ImageFolder, score

__all__ = ['OPSET', 'OnnxModel', 'export_onnx', 'largest_difference', 'quantize']

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
INSTALL = 'pip install "timm-regnet-reg[export]"'
OPSET = 18  # the one that torch's exporter writes; others are converted from it
TOLERANCE = 1e-4
CALIBRATION_IMAGES = 512


class OnnxModel(nn.Module):
    """An ONNX file as a model: images (B, C, height, width) to logits (B, num_classes), by ONNX Runtime on the CPU."""

    def __init__(self, path, num_classes: int) -> None:
        super().__init__()
        from onnxruntime import InferenceSession

        self.num_classes = num_classes
        self.session = InferenceSession(str(path), providers=['CPUExecutionProvider'])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(['logits'], {'images': images.numpy()})[0])


def _input_size(model: nn.Module) -> Tuple[int, int, int]:
    return resolve_data_config({}, model=model)['input_size']


def export_onnx(model: nn.Module, path) -> None:
    """Write a network as one ONNX file, for batches of any size.

    Args:
        model: A timm network in evaluation mode, on the CPU. It is copied before it is folded, and stays as it is.
        path: The file to write.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # inside another module, as reparameterize_model asks everything to fold itself but the module that it is given
    model = reparameterize_model(nn.Sequential(model))[0].eval()
    program = torch.onnx.export(
        model,
        (torch.zeros(2, *_input_size(model)),),  # 2, as torch.export takes a size of 1 for a constant
        dynamo=True,
        opset_version=OPSET,
        input_names=['images'],
        output_names=['logits'],
        dynamic_shapes=({0: 'batch'},),
        verbose=False,
    )
    ClearMetadataAndDocStringPass()(program.model)  # each node's stack trace, with this machine's paths
    program.save(path, external_data=False)


def largest_difference(model: nn.Module, path) -> float:
    """The largest difference of an ONNX file's logits from the model's on random images, over the largest logit."""
    onnx_model = OnnxModel(path, model.num_classes)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in (1, 3):
        images = torch.randn(batch_size, *_input_size(model), generator=generator)
        with torch.inference_mode():
            expected = model(images)
        largest = max(largest, ((onnx_model(images) - expected).abs().max() / expected.abs().max()).item())
    return largest


def quantize(source, target, images: Iterable[torch.Tensor]) -> None:
    """Quantise an ONNX file of `export_onnx` to int8, convolutions and the classifier, weights by channel.

    The regulators' convolutions, and all others with groups, stay as they are: they hold few weights, are no faster
    in int8, and the state that passes through them again and again would gather their errors.

    Args:
        source: The float32 file.
        target: The file to write.
        images: Batches (B, C, height, width); activations are quantised to the ranges that they have on these.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        batches = iter(images)

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {'images': batch.numpy()}

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
    grouped = [
        node.name
        for node in onnx.load(target).graph.node
        if node.op_type == 'Conv' and any(a.name == 'group' and a.i > 1 for a in node.attribute)
    ]
    quantize_static(
        str(target),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=['Conv', 'Gemm'],
        nodes_to_exclude=grouped,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=True,  # to 7 bits, whose products don't overflow on x86 processors without VNNI
    )


def _calibration_loader(data_dir: str, data_config: Dict[str, Any]) -> DataLoader:
    """Batches (images, labels) of random training images, prepared as for scoring."""
    for split in ('validation', 'train'):
        root = Path(data_dir, split)
        if not root.is_dir():
            raise UserError(f'{root}: no such folder; expected the images as {root}/<class>/<image>')
    try:
        dataset = create_dataset(
            '',
            root=str(root),
            split='train',
            search_split=False,
            input_img_mode='RGB' if data_config['input_size'][0] == 3 else 'L',
            transform=create_transform(**data_config),
        )
    except RuntimeError as error:
        raise UserError(f'{root}: holds no images; expected {root}/<class>/<image>. {error}') from error
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:CALIBRATION_IMAGES]
    return DataLoader(Subset(dataset, chosen.tolist()), batch_size=32)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place if all goes well, and vanishes if not."""
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path}: could not be written ({error}); free some space or give another OUTPUT') from error
    finally:
        temporary.unlink(missing_ok=True)


def main(args: argparse.Namespace) -> None:
    missing = [name for name in PACKAGES if _is_missing(name)]
    if missing:
        raise UserError(f'export needs {" and ".join(missing)}, not installed here; {INSTALL}')
    output = Path(args.output)
    if output.suffix != '.onnx':
        raise UserError(f'{output}: expected a file name that ends in .onnx')
    if not output.parent.is_dir():
        raise UserError(f'{output.parent}: no such folder; create it, or give an OUTPUT elsewhere')
    model = load_model(args.model).cpu()
    data_config = resolve_data_config({}, model=model)
    if args.int8:
        calibration = _calibration_loader(args.int8, data_config)

    with _replacing(output) as file:
        export_onnx(model, file)
        difference = largest_difference(model, file)
        if not difference <= TOLERANCE:
            raise UserError(
                f'--model {args.model}: the exported network differs from the PyTorch model by {difference:.1e} of the '
                f'largest output, and at most {TOLERANCE} is accepted, so the file was not kept'
            )
    batch = ' x '.join(map(str, ('batch', *data_config['input_size'])))
    print(
        f'{output}: ONNX opset {OPSET}, images {batch}, {_size(output)}; its outputs in ONNX Runtime differ from '
        f'PyTorch by at most {difference:.1e} of the largest'
    )

    if args.int8:
        quantized = output.with_suffix('.int8.onnx')
        with _replacing(quantized) as file, redirect_stdout(sys.stderr):
            quantize(output, file, (images for images, _ in tqdm(calibration, desc='calibrating', unit='batch')))
        images = ImageFolder(Path(args.int8, 'validation'), data_config, model.num_classes)
        results = [score(OnnxModel(path, model.num_classes), images, data_config) for path in (output, quantized)]
        for path, result in zip((output, quantized), results):
            print(
                f'{path}: top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} % on {result.images:,} images, '
                f'{_size(path)}'
            )


def _is_missing(package: str) -> bool:
    return find_spec(package) is None


def _size(path: Path) -> str:
    return f'{path.stat().st_size / 1e6:.2f} MB'
