"""Where weights come from: folders of trained weights that ship with the package, and warm starts from timm.

Both are timm PretrainedCfgs, so timm's own loader does the loading. A folder `{model}.{tag}` holds what a Hugging Face
Hub repository of the model holds: `config.json`, `model.safetensors` and the model card. A warm start, tag
`warm_{timm tag}`, is the published backbone of that tag with regulators that have learned nothing yet and change
nothing yet: the outputs are the backbone's.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, Mapping

import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models._hub import load_model_config_from_path

from .blocks import RegulatedStage, split_fusions
from .errors import UserError
from .networks import RegulatedResNet
from .regulate import check_layers

# in an installed package the folder lies inside it, in a checkout beside it
WEIGHTS_FOLDER = Path(__file__).parent / 'pretrained_cfgs'
if not WEIGHTS_FOLDER.is_dir():
    WEIGHTS_FOLDER = Path(__file__).parent.parent / 'pretrained_cfgs'


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


def is_packaged(cfg: PretrainedCfg) -> bool:
    """Whether the cfg names packaged weights; with a source, local-dir: say, it is the config of a folder's own."""
    return bool(cfg.file) and Path(cfg.file).parent.parent == WEIGHTS_FOLDER and not cfg.source


def packaged_args(cfg: PretrainedCfg) -> Dict[str, Any]:
    """The arguments of the network whose packaged weights a cfg names, other than those that are in its cfg too."""
    if not is_packaged(cfg):
        return {}
    args = json.loads(Path(cfg.file).with_name('config.json').read_text(encoding='utf-8')).get('model_args', {})
    return {key: value for key, value in args.items() if key not in ('num_classes', 'in_chans')}


def warm_start_cfg(name: str, cfg: PretrainedCfg) -> PretrainedCfg:
    """The cfg of the regulated model of that name that starts with a plain one's weights."""
    return replace(cfg, architecture=name, tag=f'warm_{cfg.tag}')


def warm_start_cfgs(name: str, backbone: str) -> Dict[str, PretrainedCfg]:
    """`{name}.warm_{tag}`: cfg, for every tag that timm has weights of; timm's default comes first."""
    default = get_pretrained_cfg(backbone)
    cfgs = sorted(
        (cfg for cfg in get_arch_pretrained_cfgs(backbone).values() if cfg.has_weights),
        key=lambda cfg: cfg.tag != default.tag,
    )
    return {f'{name}.warm_{cfg.tag}': warm_start_cfg(name, cfg) for cfg in cfgs}


def check_weights(
    state_dict: Mapping[str, Any], model: torch.nn.Module, is_optional: Callable[[str], bool] = lambda key: False
) -> None:
    """Check that a filtered state dict is the network's, and finite; of shapes torch tells when it loads them.

    `is_optional` says of a key whether it may be missing or extra. A UserError if weights are missing, unexpected, no
    floating-point tensors or not finite.
    """
    own = model.state_dict()
    weights = {key: value for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}
    floats = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    missing = [key for key in own if key not in state_dict and not is_optional(key)]
    unexpected = [key for key in state_dict if key not in own and not is_optional(key)]
    infinite = [key for key, value in floats.items() if not value.isfinite().all()]
    for problem, keys, remedy in (
        ('missing', missing, 'Give the model, with its arguments, that was trained'),
        ('unexpected', unexpected, 'Give the model, with its arguments, that was trained'),
        ('not floating-point tensors', [*(weights.keys() - floats.keys())], 'Give weights that are not quantised'),
        ('not finite', infinite, 'Take a checkpoint from before the training diverged'),
    ):
        if keys:
            raise UserError(
                f'{len(keys)} weights are {problem}: {", ".join(keys[:4])}{", …" if len(keys) > 4 else ""}. {remedy}.'
            )


def prepare_checkpoint(state_dict: Dict[str, Any], model: RegulatedResNet, strict: bool = True) -> Dict[str, Any]:
    """What timm is to load: filtered, checked, and with the regulators that a backbone's weights lack.

    A UserError as of `check_weights`, as timm lets keys pass where it adapts the classifier, or if the network has
    layers that can't start with a backbone's weights. If not `strict`, weights may be missing or unexpected, and
    regulators that are missing change nothing, either.
    """
    split_fusions(state_dict)
    cfg = model.pretrained_cfg
    # a warm start that was fine-tuned and saved still has its tag, but brings its regulators
    is_plain = not any(_is_added(key) for key in state_dict)
    warm_start = is_plain and (not strict or str(cfg.get('tag')).startswith('warm_'))

    def is_optional(key: str) -> bool:  # the classifier may be another one, and older files lack the counters
        is_extra = key.startswith('fc.') or key.endswith('.num_batches_tracked')
        return not strict or is_extra or (warm_start and _is_added(key))

    try:
        if is_plain and not warm_start and any(_is_added(key) for key in model.state_dict()):
            check_weights(state_dict, model, lambda key: is_optional(key) or _is_added(key))  # others than plain ones
            told = "a plain network's; pretrained_strict=False adds regulators that leave its outputs as they are"
            raise UserError(f'They are {told}.')
        for name, stage in model.named_children() if warm_start and strict else ():
            if isinstance(stage, RegulatedStage):
                check_layers(name, stage)
        check_weights(state_dict, model, is_optional)
    except (UserError, TypeError) as error:  # a TypeError timm would take for a filter's without the argument `model`
        raise UserError(f'The weights of {cfg["architecture"]} could not be loaded. {error}') from error
    if warm_start or not strict:  # with regulators that change nothing in a network with these batch norms
        model.load_state_dict({key: value for key, value in state_dict.items() if '.bn' in key}, strict=False)
        for stage in model.stages():
            if isinstance(stage, RegulatedStage):
                stage.start_at_identity()
        added = {key: value for key, value in model.state_dict().items() if _is_added(key)}
        state_dict = {**added, **state_dict}
    return state_dict


def _is_added(key: str) -> bool:
    return '.regulator' in key or '.fusion' in key
