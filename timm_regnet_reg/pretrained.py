"""Where weights come from: folders of trained weights that ship with the package, and warm starts from timm.

Both are timm PretrainedCfgs, so timm's own loader does the loading. A folder `{model}.{tag}` holds what a Hugging Face
Hub repository of the model holds: `config.json`, `model.safetensors` and the model card. A warm start, tag
`warm_{timm tag}`, is the published backbone of that tag with regulators that have learned nothing yet and change
nothing yet: the outputs are the backbone's.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Sequence, Tuple

import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models._hub import load_model_config_from_path

from .blocks import RegulatedStage, split_fusions
from .errors import UserError
from .networks import RegulatedResNet
from .regulate import check_regulated

__all__ = [
    'WEIGHTS_FOLDER',
    'check_weights',
    'file_sha256',
    'filter_checkpoint',
    'packaged_args',
    'prepare_checkpoint',
    'trained_cfgs',
    'warm_start_cfg',
    'warm_start_cfgs',
]

# in an installed package the folder lies inside it, in a checkout beside it
WEIGHTS_FOLDER = Path(__file__).parent / 'pretrained_cfgs'
if not WEIGHTS_FOLDER.is_dir():
    WEIGHTS_FOLDER = Path(__file__).parent.parent / 'pretrained_cfgs'


def file_sha256(path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def trained_cfgs() -> Dict[str, PretrainedCfg]:
    """`{model}.{tag}`: cfg, for every folder of trained weights."""
    cfgs = {}
    for config_file in sorted(WEIGHTS_FOLDER.glob('[!.]*/config.json')):  # `package` writes in hidden folders first
        cfg, _, _ = load_model_config_from_path(config_file.parent)
        # as a plain file, so that `pretrained_cfg_overlay=dict(file=...)` does what it does for timm's own models
        cfg.update(file=str(config_file.with_name('model.safetensors')), source=None)
        # JSON knows no tuples, which timm's cfgs hold
        cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
        cfgs[config_file.parent.name] = PretrainedCfg(**cfg)
    return cfgs


def packaged_args(cfg: PretrainedCfg) -> Dict[str, Any]:
    """The arguments of the network whose packaged weights a cfg names, other than those that are in its cfg too."""
    folder = Path(cfg.file or '').parent
    if folder.parent != WEIGHTS_FOLDER:
        return {}
    args = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('model_args', {})
    return {key: value for key, value in args.items() if key not in ('num_classes', 'in_chans')}


def warm_start_cfg(name: str, cfg: PretrainedCfg) -> PretrainedCfg:
    """The cfg of a regulated model that starts with a plain one's weights.

    Args:
        name: Name of the regulated model.
        cfg: The plain model's cfg.
    """
    return replace(
        cfg,
        architecture=name,
        tag=f'warm_{cfg.tag}',
        description=f'Weights of {cfg.architecture}.{cfg.tag} with untrained regulators that leave its outputs '
        'unchanged: a start for fine-tuning.',
    )


def warm_start_cfgs(name: str, backbone: str) -> Dict[str, PretrainedCfg]:
    """`{name}.warm_{tag}`: cfg, for every tag that timm has weights of; timm's default comes first.

    Args:
        name: Name of the regulated model.
        backbone: timm's name of the plain one.
    """
    default = get_pretrained_cfg(backbone)
    cfgs = sorted(
        (cfg for cfg in get_arch_pretrained_cfgs(backbone).values() if cfg.has_weights),
        key=lambda cfg: cfg.tag != default.tag,
    )
    return {f'{name}.warm_{cfg.tag}': warm_start_cfg(name, cfg) for cfg in cfgs}


def check_weights(
    state_dict: Mapping[str, Any],
    model: torch.nn.Module,
    is_optional: Callable[[str], bool] = lambda key: False,
    adapted: Sequence[Tuple[str, int]] = (),
) -> None:
    """Check that a state dict is the network's, and finite.

    Args:
        state_dict: What was loaded.
        model: The network that it is for.
        is_optional: Says of a key whether it may be missing or extra.
        adapted: Beginnings of keys, and the dimension in which these weights may differ, as then they are adapted.

    Raises:
        UserError: Weights are missing, unexpected, no floating-point tensors, of another shape or not finite.
    """
    own = model.state_dict()
    state_dict = dict(state_dict)
    split_fusions(state_dict)
    # counters alone are integers
    types = {key: isinstance(v, torch.Tensor) and v.is_floating_point() for key, v in state_dict.items()}
    remedy = 'Give the model, with its arguments, that was trained, or weights of this one.'
    for problem, remedy, keys in (
        ('missing', remedy, [key for key in own if key not in state_dict and not is_optional(key)]),
        ('unexpected', remedy, [key for key in state_dict if key not in own and not is_optional(key)]),
        (
            'not floating-point tensors',
            'Give weights as they were trained, and not as they were quantised.',
            [key for key, is_float in types.items() if not is_float and not key.endswith('num_batches_tracked')],
        ),
        (
            'of another shape',
            remedy,
            [
                f'{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}'
                for key, value in state_dict.items()
                if key in own and isinstance(value, torch.Tensor) and value.shape != own[key].shape
                if not any(
                    key.startswith(beginning) and value.shape[dim : dim + 1] != own[key].shape[dim : dim + 1]
                    for beginning, dim in adapted
                )
            ],
        ),
        (
            'not finite',
            'Take a checkpoint from before the training diverged.',
            [key for key, value in state_dict.items() if types[key] and not value.isfinite().all()],
        ),
    ):
        if keys:
            raise UserError(
                f'{len(keys)} weights are {problem}: {", ".join(keys[:4])}{", …" if len(keys) > 4 else ""}. {remedy}'
            )


def filter_checkpoint(state_dict: Dict[str, torch.Tensor], model: RegulatedResNet) -> Dict[str, torch.Tensor]:
    """timm's checkpoint filter: weights under the names that they have today.

    Args:
        state_dict: What was loaded for the model, of any version of this package.
        model: The network that it is for.
    """
    state_dict = dict(state_dict)
    split_fusions(state_dict)
    return state_dict


def start_warm(state_dict: Dict[str, torch.Tensor], model: RegulatedResNet) -> Dict[str, torch.Tensor]:
    """A backbone's weights, and with them those of regulators that change nothing.

    Args:
        state_dict: The backbone's.
        model: The network that they are for.

    Raises:
        UserError: The network has layers that can't be started so.
    """
    try:
        check_regulated(model)
    except TypeError as error:  # which timm would take for a filter's without the argument `model`
        raise UserError(f'The network cannot start with the weights of a backbone. {error}') from error
    model.load_state_dict({key: value for key, value in state_dict.items() if '.bn' in key}, strict=False)
    for stage in model.stages():
        if isinstance(stage, RegulatedStage):
            stage.start_at_identity()
    return {**state_dict, **{key: value for key, value in model.state_dict().items() if _is_added(key)}}


def _is_added(key: str) -> bool:
    return '.regulator' in key or '.fusion' in key


def prepare_checkpoint(state_dict: Dict[str, torch.Tensor], model: RegulatedResNet) -> Dict[str, torch.Tensor]:
    """What timm is to load: filtered, with the regulators that a warm start lacks, and checked.

    Args:
        state_dict: What was loaded for the model.
        model: The network that it is for.

    Raises:
        UserError: As `check_weights` and `start_warm`. timm itself lets keys pass where it adapts the classifier.
    """
    state_dict = filter_checkpoint(state_dict, model)
    cfg = model.pretrained_cfg
    # a warm start that was fine-tuned and saved still has its tag, but brings its regulators
    warm_start = str(cfg.get('tag')).startswith('warm_') and not any(_is_added(key) for key in state_dict)

    def is_optional(key: str) -> bool:  # the classifier may be another one, and older files lack the counters
        return key.startswith('fc.') or key.endswith('.num_batches_tracked') or (warm_start and _is_added(key))

    # timm adapts these to other numbers of classes and channels
    adapted = [('fc.', 0), (f'{cfg["first_conv"]}.', 1)]
    try:
        check_weights(state_dict, model, is_optional, adapted)
        return start_warm(state_dict, model) if warm_start else state_dict
    except UserError as error:
        raise UserError(f'The weights of {cfg["architecture"]} could not be loaded. {error}') from error
