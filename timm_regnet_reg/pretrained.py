"""Where weights come from: folders of trained weights that ship with the package, and warm starts from timm.

Both are timm PretrainedCfgs, so timm's own loader does the loading. A folder `{model}.{tag}` holds what a Hugging Face
Hub repository of the model holds: `config.json`, `model.safetensors` and the model card. A warm start, tag
`warm_{timm tag}`, is the published backbone of that tag with regulators that have learned nothing yet and change
nothing yet: the outputs are the backbone's.
"""

import hashlib
import json
import logging
import pickle
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models._hub import load_model_config_from_path

from .blocks import RegulatedStage
from .errors import UserError, reason
from .networks import RegulatedResNet, check_regulated

__all__ = [
    'WEIGHTS_FOLDER',
    'check_weights',
    'file_sha256',
    'filter_checkpoint',
    'packaged_args',
    'trained_cfgs',
    'warm_start_cfg',
    'warm_start_cfgs',
    'weights_of',
]

_logger = logging.getLogger(__name__)

# what torch and timm stumble over in a file that holds something else
_NO_WEIGHTS = (AttributeError, KeyError, pickle.UnpicklingError)

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
        try:
            cfg, _, _ = load_model_config_from_path(config_file.parent)
            # as a plain file, so that `pretrained_cfg_overlay=dict(file=...)` does what it does for timm's own models
            cfg.update(file=str(config_file.with_name('model.safetensors')), source=None)
            # JSON knows no tuples, which timm's cfgs hold
            cfg = {key: tuple(value) if isinstance(value, list) else value for key, value in cfg.items()}
            cfgs[config_file.parent.name] = PretrainedCfg(**cfg)
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError(
                f'{config_file} is not a config that this timm can read ({error!r}). Install timm_regnet_reg again, or '
                'move the folder away.'
            ) from error
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


@contextmanager
def weights_of(name: str, cfg: PretrainedCfg, cache_dir: Optional[str]) -> Iterator[None]:
    """Check a model's weights before the block loads them, and say clearly why they can't be loaded.

    Args:
        name: Name of the model.
        cfg: What says where they are.
        cache_dir: The argument of timm's create_model.

    Raises:
        RuntimeError: The model has no weights, or they can't be had, are damaged or don't fit.
    """
    source = cfg.state_dict and 'the given state dict' or cfg.file or cfg.hf_hub_id or cfg.url
    if not source:
        raise RuntimeError(
            f'{name} has no pretrained weights. Create it with pretrained=False, or give a plain timm network with '
            'weights to timm_regnet_reg.regulate(). Models with weights: timm.list_pretrained("regnet_reg_*") and '
            'timm.list_pretrained("cifar_*").'
        )
    _announce_download(name, cfg, cache_dir)
    failed = f'The weights of {name} could not be loaded from {source}'
    try:
        _check_hash(cfg, cache_dir)
        yield
    except UserError as error:  # says itself what to do
        raise RuntimeError(f'{failed}: {error}') from error
    # HTTPError is the Hub client's HTTP library's: a connection that breaks is no OSError
    except (OSError, EOFError, HTTPError, SafetensorError, RuntimeError, *_NO_WEIGHTS) as error:
        kind = f'{type(error).__name__}: ' if isinstance(error, _NO_WEIGHTS) else ''
        raise RuntimeError(
            f'{failed}: {kind}{reason(error)}\n'
            'If they should have been downloaded, check the connection and the name; offline, they must be in the '
            'cache. If the file is damaged, delete it and fetch or install it again. pretrained=False needs no weights.'
        ) from error


def _announce_download(name: str, cfg: PretrainedCfg, cache_dir: Optional[str]) -> None:
    """Say what is about to be downloaded: without a connection the Hub's client tries for a minute, and is silent."""
    if cfg.source == 'local-dir' or cfg.source != 'hf-hub' and (cfg.state_dict or cfg.file) or not cfg.hf_hub_id:
        return
    repo_id, _, revision = cfg.hf_hub_id.partition('@')
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ['model.safetensors', 'pytorch_model.bin']
    if not any(isinstance(try_to_load_from_cache(repo_id, f, cache_dir, revision or None), str) for f in files):
        _logger.warning(
            'The weights of %s are not in the cache: downloading them from %s on the Hugging Face Hub. Without a '
            'connection this fails after about a minute.',
            name,
            cfg.hf_hub_id,
        )


def _check_hash(cfg: PretrainedCfg, cache_dir: Optional[str]) -> None:
    """Compare `model.safetensors` with the SHA-256 in the config beside it, where there is one.

    Done before loading, as timm's loader would take a pickle in place of a missing file.

    Raises:
        RuntimeError: The weights aren't those that were packaged.
        OSError: They aren't there.
    """
    locate: Callable[[str], Any]
    if cfg.source == 'hf-hub':
        repo_id, _, revision = cfg.hf_hub_id.partition('@')
        locate = partial(hf_hub_download, repo_id, revision=revision or None, cache_dir=cache_dir)
    elif cfg.source == 'local-dir':
        locate = Path(cfg.file).joinpath
    elif Path(cfg.file or '').parent.parent == WEIGHTS_FOLDER:
        locate = Path(cfg.file).parent.joinpath
    else:
        return
    expected = json.loads(Path(locate('config.json')).read_text(encoding='utf-8')).get('sha256')
    if expected is None:
        return
    weights = Path(locate('model.safetensors'))
    found = file_sha256(weights)
    if found != expected:
        raise RuntimeError(f'{weights} has SHA-256 {found}, its config says {expected}.')


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
    """timm's checkpoint filter: check that the weights are the network's, and give a warm start its regulators.

    Args:
        state_dict: What was loaded for the model.
        model: The network that it is for.

    Returns:
        The state dict; of a warm start, with regulators that change nothing.

    Raises:
        UserError: As `check_weights`, or the network's layers can't be started warm. timm itself lets keys pass where
            it adapts the classifier.
    """

    def is_added(key: str) -> bool:
        return '.regulator' in key or '.fusion' in key

    cfg = model.pretrained_cfg
    # a warm start that was fine-tuned and saved still has its tag, but brings its regulators
    warm_start = str(cfg.get('tag')).startswith('warm_') and not any(is_added(key) for key in state_dict)

    def is_optional(key: str) -> bool:  # the classifier may be another one, and older files lack the counters
        return key.startswith('fc.') or key.endswith('.num_batches_tracked') or warm_start and is_added(key)

    if warm_start:
        try:
            check_regulated(model)
        except TypeError as error:  # which timm would take for a filter's without the argument `model`
            raise UserError(f'The network cannot start with the weights of a backbone. {error}') from error
    # timm adapts these to other numbers of classes and channels
    check_weights(state_dict, model, is_optional, adapted=[('fc.', 0), (f'{cfg["first_conv"]}.', 1)])
    _check_classes(state_dict, model)
    if not warm_start:
        return state_dict
    model.load_state_dict({key: value for key, value in state_dict.items() if '.bn' in key}, strict=False)
    for stage in model.children():
        if isinstance(stage, RegulatedStage):
            stage.start_at_identity()
    return {**state_dict, **{key: value for key, value in model.state_dict().items() if is_added(key)}}


def _check_classes(state_dict: Dict[str, torch.Tensor], model: RegulatedResNet) -> None:
    """Raise a UserError for a config that contradicts itself or its weights: timm would leave the classifier random."""
    cfg = model.pretrained_cfg
    if cfg.get('source') not in ('hf-hub', 'local-dir'):
        return
    found = {
        'num_classes': cfg['num_classes'],
        'model_args': model.pretrained_model_args.get('num_classes'),
        'the weights': len(state_dict['fc.weight']) if 'fc.weight' in state_dict else None,
    }
    if len({classes for classes in found.values() if classes is not None}) > 1:
        told = ', '.join(f'{classes} in {where}' for where, classes in found.items() if classes is not None)
        raise UserError(f'The numbers of classes differ: {told}. Correct config.json, or package the network again.')
