"""Where weights come from: folders of trained weights that ship with the package, and warm starts from timm.

Both are timm PretrainedCfgs, so timm's own loader does the loading. A folder `{model}.{tag}` holds what a Hugging Face
Hub repository of the model holds: `config.json`, `model.safetensors` and the model card. A warm start, tag
`warm_{timm tag}`, is the published backbone of that tag with regulators that have learned nothing yet and change
nothing yet: the outputs are the backbone's.
"""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_path

from .networks import RegulatedResNet, start_at_identity

__all__ = ['WEIGHTS_FOLDER', 'file_sha256', 'filter_checkpoint', 'trained_cfgs', 'warm_start_cfgs', 'weights_of']

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
    return {
        f'{name}.warm_{cfg.tag}': replace(
            cfg,
            architecture=name,
            tag=f'warm_{cfg.tag}',
            description=f'Weights of {backbone}.{cfg.tag} with untrained regulators that leave its outputs unchanged: '
            'a start for fine-tuning.',
        )
        for cfg in cfgs
    }


@contextmanager
def weights_of(
    name: str,
    tag_or_cfg: Any,
    overlay: Optional[Dict[str, Any]],
    cache_dir: Optional[str],
) -> Iterator[None]:
    """Check a model's weights before the block loads them, and say clearly why they can't be loaded.

    Args:
        name: Name of the model.
        tag_or_cfg: The `pretrained_cfg` argument of timm's create_model.
        overlay: Its `pretrained_cfg_overlay` argument.
        cache_dir: Its `cache_dir` argument.

    Raises:
        RuntimeError: The model has no weights, or they can't be had, are damaged or don't fit.
    """
    cfg = resolve_pretrained_cfg(name, tag_or_cfg, overlay)
    source = cfg.state_dict and 'the given state dict' or cfg.file or cfg.hf_hub_id or cfg.url
    if not source:
        raise RuntimeError(
            f'{name} has no pretrained weights. Create it with pretrained=False, or give a plain timm network with '
            'weights to timm_regnet_reg.regulate(). Models with weights: timm.list_pretrained("regnet_reg_*").'
        )
    try:
        _check_hash(cfg, cache_dir)
        yield
    # HTTPError is the Hub client's HTTP library's: a connection that breaks is no OSError
    except (OSError, EOFError, HTTPError, SafetensorError, RuntimeError) as error:
        raise RuntimeError(
            f'The weights of {name} could not be loaded from {source}: {error or type(error).__name__}\n'
            'If they should have been downloaded, check the connection and the name; offline, they must be in the '
            'cache. If the file is damaged, delete it and fetch or install it again. pretrained=False needs no weights.'
        ) from error


def _check_hash(cfg: PretrainedCfg, cache_dir: Optional[str]) -> None:
    """Compare `model.safetensors` with the SHA-256 in the config beside it, where there is one.

    Done before loading, as timm's loader would take a pickle in place of a missing file.

    Raises:
        RuntimeError: The weights aren't those that were packaged.
        OSError: They aren't there.
    """
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


def filter_checkpoint(state_dict: Dict[str, torch.Tensor], model: RegulatedResNet) -> Dict[str, torch.Tensor]:
    """timm's checkpoint filter: check that the weights are the network's, and give a warm start its regulators.

    Args:
        state_dict: What was loaded for the model.
        model: The network that it is for.

    Returns:
        The state dict; of a warm start, with regulators that change nothing.

    Raises:
        RuntimeError: Weights are missing, unexpected or not finite. timm itself lets keys pass where it adapts the
            classifier.
    """

    def is_added(key: str) -> bool:
        return '.regulator' in key or '.fusion' in key

    tag = str(model.pretrained_cfg.get('tag'))
    # a warm start that was fine-tuned and saved still has its tag, but brings its regulators
    warm_start = tag.startswith('warm_') and not any(is_added(key) for key in state_dict)
    own = model.state_dict()

    def is_optional(key: str) -> bool:  # the classifier may be another one, and older files lack the counters
        return key.startswith('fc.') or key.endswith('.num_batches_tracked') or warm_start and is_added(key)

    for problem, keys in (
        ('missing', [key for key in own if key not in state_dict and not is_optional(key)]),
        ('unexpected', [key for key in state_dict if key not in own and not key.startswith('fc.')]),
        ('not finite', [key for key, value in state_dict.items() if not value.isfinite().all()]),
    ):
        if keys:
            raise RuntimeError(
                f'{len(keys)} weights are {problem}: {", ".join(keys[:4])}{", …" if len(keys) > 4 else ""}. Give the '
                'model, with its arguments, that was trained, or weights of this one.'
            )
    if not warm_start:
        return state_dict
    model.load_state_dict({key: value for key, value in state_dict.items() if '.bn' in key}, strict=False)
    start_at_identity(model)
    return {**state_dict, **{key: value for key, value in model.state_dict().items() if is_added(key)}}
