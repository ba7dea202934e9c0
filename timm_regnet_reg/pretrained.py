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
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg, resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_path

from .networks import RegulatedResNet, start_at_identity

__all__ = ['WEIGHTS_FOLDER', 'check_weights', 'filter_checkpoint', 'trained_cfgs', 'warm_start_cfgs', 'weights_of']

# in an installed package the folder lies inside it, in a checkout beside it
WEIGHTS_FOLDER = Path(__file__).parent / 'pretrained_cfgs'
if not WEIGHTS_FOLDER.is_dir():
    WEIGHTS_FOLDER = Path(__file__).parent.parent / 'pretrained_cfgs'


def trained_cfgs() -> Dict[str, PretrainedCfg]:
    """`{model}.{tag}`: cfg, for every folder of trained weights."""
    cfgs = {}
    for config_file in sorted(WEIGHTS_FOLDER.glob('*/config.json')):
        cfg, _, _ = load_model_config_from_path(config_file.parent)
        # as a plain file, so that `pretrained_cfg_overlay=dict(file=...)` does what it does for timm's own models
        cfg.update(file=str(config_file.with_name('model.safetensors')), source=None)
        cfgs[config_file.parent.name] = PretrainedCfg(**cfg)
    return cfgs


def warm_start_cfgs(name: str, backbone: str) -> Dict[str, PretrainedCfg]:
    """`{name}.warm_{tag}`: cfg, for every tag that timm has weights of; timm's default comes first.

    Args:
        name: Name of the regulated model.
        backbone: timm's name of the plain one.
    """
    default = get_pretrained_cfg(backbone) if get_arch_pretrained_cfgs(backbone) else None
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
def weights_of(name: str, tag_or_cfg: Any, overlay: Optional[Dict[str, Any]]) -> Iterator[None]:
    """Say clearly why a model's weights can't be loaded in the block.

    Args:
        name: Name of the model.
        tag_or_cfg: The `pretrained_cfg` argument of timm's create_model.
        overlay: Its `pretrained_cfg_overlay` argument.

    Raises:
        RuntimeError: The model has no weights, or no such tag, or the weights can't be had, are damaged or don't fit.
    """
    cfg = resolve_pretrained_cfg(name, tag_or_cfg, overlay)
    source = cfg.file or cfg.hf_hub_id or cfg.url or (cfg.state_dict and 'the given state dict')
    if not source:
        raise RuntimeError(
            f'{name} has no pretrained weights. Create it with pretrained=False, or give a plain timm network with '
            'weights to timm_regnet_reg.regulate(). Models with weights: timm.list_pretrained("regnet_reg_*").'
        )
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RuntimeError(
            f'The weights of {name} could not be loaded from {source}: {error}\n'
            'If they should have been downloaded, check the connection and the name; offline, they must be in the '
            'cache. If the file is damaged, delete it and fetch or install it again. pretrained=False needs no weights.'
        ) from error


def check_weights(folder: Path) -> None:
    """Compare `model.safetensors` with the SHA-256 in the config beside it, where there is one.

    Args:
        folder: Folder in the layout of a Hub repository.

    Raises:
        RuntimeError: The weights aren't those that were packaged.
    """
    expected = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get('sha256')
    found = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest() if expected else None
    if found != expected:
        raise RuntimeError(f'{folder / "model.safetensors"} has SHA-256 {found}, its config says {expected}.')


def filter_checkpoint(
        state_dict: Dict[str, torch.Tensor],
        model: RegulatedResNet,
        cache_dir: Optional[str] = None,
) -> Dict[str, torch.Tensor]:
    """timm's checkpoint filter: check the file's hash, and give a warm start its regulators.

    Args:
        state_dict: What was loaded for the model.
        model: The network that it is for.
        cache_dir: The cache that it was downloaded to, None for the usual one.

    Returns:
        The state dict; of a warm start, with regulators that change nothing.

    Raises:
        RuntimeError: The weights aren't those that were packaged.
    """
    cfg = model.pretrained_cfg
    if cfg.get('source') == 'hf-hub':
        repo_id, _, revision = cfg['hf_hub_id'].partition('@')
        check_weights(Path(hf_hub_download(
            repo_id, 'config.json', revision=revision or None, cache_dir=cache_dir, local_files_only=True)).parent)
    elif cfg.get('source') == 'local-dir':
        check_weights(Path(cfg['file']))
    elif Path(cfg.get('file') or '').parent.parent == WEIGHTS_FOLDER:
        check_weights(Path(cfg['file']).parent)

    def is_added(key: str) -> bool:
        return '.regulator' in key or '.fusion' in key

    if not str(cfg.get('tag')).startswith('warm_') or any(is_added(key) for key in state_dict):
        return state_dict
    model.load_state_dict({key: value for key, value in state_dict.items() if '.bn' in key}, strict=False)
    start_at_identity(model)
    return {**state_dict, **{key: value for key, value in model.state_dict().items() if is_added(key)}}
