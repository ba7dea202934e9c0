"""The models in timm's registry: one table of backbones, three cells, one loop.

Named after the method, and not `regnet`, so that timm doesn't file them with the networks of *Designing Network
Design Spaces*, which are called RegNet too.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, Optional, Sequence, Tuple, Union

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    ResNet,
    build_model_with_cfg,
    create_model,
    generate_default_cfgs,
    get_pretrained_cfg,
    is_model,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnet import BasicBlock, Bottleneck

from .cells import CELLS
from .networks import CifarRegulatedResNet, RegulatedResNet, check_arguments
from .pretrained import is_packaged, packaged_args, prepare_checkpoint, trained_cfgs, warm_start_cfg, warm_start_cfgs
from .regulate import add_regulators, check_regulable

__all__ = []  # timm adds the entrypoints


def _resnet(block: type, *layers: int, se: bool = False, **kwargs: Any) -> Dict[str, Any]:
    if se:
        kwargs['block_args'] = dict(attn_layer='se')
    return dict(block=block, layers=layers, **kwargs)


_D: Dict[str, Any] = dict(stem_width=32, stem_type='deep', avg_down=True)

# ImageNet form: the arguments of timm's ResNet
BACKBONES: Dict[str, Dict[str, Any]] = {
    'resnet18': _resnet(BasicBlock, 2, 2, 2, 2),
    'resnet34': _resnet(BasicBlock, 3, 4, 6, 3),
    'resnet50': _resnet(Bottleneck, 3, 4, 6, 3),
    'resnet101': _resnet(Bottleneck, 3, 4, 23, 3),
    'resnet152': _resnet(Bottleneck, 3, 8, 36, 3),
    'resnet50d': _resnet(Bottleneck, 3, 4, 6, 3, **_D),
    'resnet101d': _resnet(Bottleneck, 3, 4, 23, 3, **_D),
    'wide_resnet50_2': _resnet(Bottleneck, 3, 4, 6, 3, base_width=128),
    'seresnet18': _resnet(BasicBlock, 2, 2, 2, 2, se=True),
    'seresnet34': _resnet(BasicBlock, 3, 4, 6, 3, se=True),
    'seresnet50': _resnet(Bottleneck, 3, 4, 6, 3, se=True),
    'seresnet101': _resnet(Bottleneck, 3, 4, 23, 3, se=True),
    'seresnet152': _resnet(Bottleneck, 3, 8, 36, 3, se=True),
    'resnext50_32x4d': _resnet(Bottleneck, 3, 4, 6, 3, cardinality=32, base_width=4),
    'resnext50_8x14d': _resnet(Bottleneck, 3, 4, 6, 3, cardinality=8, base_width=14),
    'resnext50_4x24d': _resnet(Bottleneck, 3, 4, 6, 3, cardinality=4, base_width=24),
    'resnext50_2x40d': _resnet(Bottleneck, 3, 4, 6, 3, cardinality=2, base_width=40),
    'resnext101_32x4d': _resnet(Bottleneck, 3, 4, 23, 3, cardinality=32, base_width=4),
    'resnext101_64x4d': _resnet(Bottleneck, 3, 4, 23, 3, cardinality=64, base_width=4),
    'seresnext50_32x4d': _resnet(Bottleneck, 3, 4, 6, 3, se=True, cardinality=32, base_width=4),
    'seresnext101_32x4d': _resnet(Bottleneck, 3, 4, 23, 3, se=True, cardinality=32, base_width=4),
}

# CIFAR form: depth 6n + 2
CIFAR_BACKBONES: Dict[str, Dict[str, Any]] = {
    f'{kind}{6 * n + 2}': _resnet(BasicBlock, n, n, n, se=kind == 'seresnet')
    for kind in ('resnet', 'seresnet')
    for n in (3, 5, 7, 9, 18)
}


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1',
        'classifier': 'fc',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2101.00590',
        'paper_name': 'RegNet: Self-Regulated Network for Image Classification',
        **kwargs,
    }


CIFAR_CFG = _cfg(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),  # of CIFAR-10's training images
    std=(0.2470, 0.2435, 0.2616),
)


def _models() -> Dict[str, Tuple[type, Dict[str, Any], Dict[str, Any], str]]:
    """name: (class, arguments, cfg, docstring) of every model."""
    models: Dict[str, Tuple[type, Dict[str, Any], Dict[str, Any], str]] = {}
    for model_class, backbones in ((RegulatedResNet, BACKBONES), (CifarRegulatedResNet, CIFAR_BACKBONES)):
        for backbone, args in backbones.items():
            if model_class is CifarRegulatedResNet:
                cfg, form = CIFAR_CFG, '32x32 images'
                doc = f'The plain {backbone} for {form} that the regulated ones are compared with.'
                models[f'cifar_{backbone}'] = model_class, dict(args, regulated_stages=()), cfg, doc
            else:
                cfg, form = _cfg(), '224x224 images'  # taken where timm has no weights
            for cell, cell_class in CELLS.items():
                doc = f'{backbone} for {form}, regulated by a {cell_class.__name__} in every stage.'
                models[f'regnet_reg_{backbone}_{cell}'] = model_class, dict(args, cell=cell), cfg, doc
    return models


MODELS = _models()
CIFAR_MODELS = tuple(name for name, (model_class, *_) in MODELS.items() if model_class is CifarRegulatedResNet)


def _create(
    model_class: Callable[..., ResNet],
    name: str,
    model_args: Dict[str, Any],
    pretrained: bool,
    pretrained_cfg: Union[str, Dict[str, Any], PretrainedCfg, None] = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    **kwargs: Any,
) -> RegulatedResNet:
    """What all entrypoints do; the caller's arguments come before those that were recorded with packaged weights."""
    overlay = dict(pretrained_cfg_overlay or {})
    if any(overlay.get(key) for key in ('hf_hub_id', 'url', 'state_dict')):
        overlay.setdefault('file', None)  # packaged weights are a file, which timm would prefer
    cfg, tagged = (resolve_pretrained_cfg(name, pretrained_cfg, given) for given in (overlay, None))
    recorded = packaged_args(cfg) or packaged_args(tagged)  # a tag's, too, if its file is another
    if is_packaged(tagged) and not (pretrained and is_packaged(cfg)):
        overlay.setdefault('label_names', None)  # of other weights than these
    args = {**model_args, **recorded, **kwargs}

    def build(**args: Any) -> ResNet:
        model = model_class(**args)
        # as timm's create_model records the caller's, for whoever saves the network
        model._model_args = {**getattr(model, '_model_args', {}), **recorded}
        return model

    # not all of timm's default out_indices, as the CIFAR form has one stage less
    num_features = 4 if args.get('backbone', name).split('.')[0] in CIFAR_MODELS else 5
    feature_cfg = {'out_indices': tuple(range(num_features)), **args.pop('feature_cfg', {})}
    if args.get('features_only'):
        _check_out_indices(args.get('out_indices', feature_cfg['out_indices']), num_features)
    return build_model_with_cfg(
        build,
        name,
        pretrained,
        pretrained_cfg,
        overlay,
        feature_cfg=feature_cfg,
        pretrained_filter_fn=partial(prepare_checkpoint, strict=args.get('pretrained_strict', True)),
        **args,
    )


def _check_out_indices(indices: Union[int, Sequence[int]], num_features: int) -> None:
    given = range(-indices, 0) if isinstance(indices, int) else indices
    if len(given) == 0 or not all(-num_features <= index < num_features for index in given):
        told = f'indices from 0 to {num_features - 1} are expected, or how many of the last, from 1 to {num_features}'
        raise ValueError(f'out_indices={indices!r} was given: {told}.')


def _entrypoint(name: str, model_class: type, model_args: Dict[str, Any], doc: str) -> Callable[..., RegulatedResNet]:
    cell = model_args.get('cell')

    def create(pretrained: bool = False, **kwargs) -> RegulatedResNet:
        if kwargs.get('cell', cell) != cell or (not cell and kwargs.get('regulated_stages', ()) not in ((), [])):
            raise ValueError(
                f'{name} is {f"regulated by a {cell}" if cell else "a plain network"}, as its name says. For another '
                'cell or a regulated network choose the model of that name, regnet_reg_{backbone}_{cell}.'
            )
        return _create(model_class, name, model_args, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{doc}

    Args:
        pretrained: Load the weights of the model's default tag.
        **kwargs: What timm's ResNet takes, and `regulated_stages` (stages with a regulator, counted from 1; default
            all), `shortcut` ('conv' or 'none', in CIFAR form also 'pad') and `cell_weight_decay` (default True).

    Returns:
        The network, or its feature extractor with `features_only=True`.
    """
    return create


def _default_cfgs() -> Dict[str, DefaultCfg]:
    trained = trained_cfgs()
    cfgs = {}
    for name, (model_class, model_args, cfg, _) in MODELS.items():
        cfgs.update({key: value for key, value in trained.items() if key.startswith(f'{name}.')})
        if model_class is RegulatedResNet:
            cfgs.update(warm_start_cfgs(name, name.removeprefix('regnet_reg_').removesuffix(f'_{model_args["cell"]}')))
        if not any(key.startswith(f'{name}.') for key in cfgs):
            cfgs[name] = cfg
    cfgs['regnet_reg'] = _cfg()
    cfgs.update({key: value for key, value in trained.items() if key.startswith('regnet_reg.')})
    return generate_default_cfgs(cfgs)


default_cfgs = _default_cfgs()

for _name, (_model_class, _model_args, _, _doc) in MODELS.items():
    globals()[_name] = register_model(_entrypoint(_name, _model_class, _model_args, _doc))


def _regulated(
    backbone: str,
    cell: str,
    regulated_stages: Optional[Sequence[int]] = None,
    cell_weight_decay: bool = True,
    **kwargs: Any,
) -> ResNet:
    if backbone.split('.')[0] in MODELS:
        kwargs['regulated_stages'] = ()
    else:
        check_arguments(RegulatedResNet.output_strides, **kwargs)
    model = create_model(backbone, **kwargs)
    check_regulable(model)
    add_regulators(model, cell, regulated_stages)
    model.cell_weight_decay = cell_weight_decay
    model._model_args = dict(backbone=backbone, cell=cell, regulated_stages=regulated_stages)
    return model


@register_model
def regnet_reg(pretrained: bool = False, **kwargs) -> RegulatedResNet:
    """Any ResNet of timm's that `regulate` takes, regulated; networks that `regulate` made are saved as this model.

    Args:
        pretrained: Start with the backbone's weights and regulators that leave its outputs as they are.
        **kwargs: `backbone`, timm's name of the plain network, with or without tag (default 'resnet50'), `cell`
            ('convrnn', 'convgru' or 'convlstm', the default), `regulated_stages` (counted from 1; default all),
            `cell_weight_decay` (default True), and what the backbone takes.

    Returns:
        The network, or its feature extractor with `features_only=True`.
    """
    model_args: Dict[str, Any] = dict(backbone='resnet50', cell='convlstm')
    backbone = kwargs.get('backbone', model_args['backbone'])
    if not isinstance(backbone, str) or ':' in backbone:
        raise ValueError(
            f"backbone={backbone!r:.60} was given: a name that is registered in timm is expected, such as 'resnet50'. "
            'To regulate a network, of a folder or repository, say, give it to timm_regnet_reg.regulate().'
        )
    # timm's scripts pass the cfg of the name `regnet_reg`, which knows of no backbone: as if none was given
    if kwargs.get('pretrained_cfg') in (None, '', resolve_pretrained_cfg('regnet_reg').to_dict()):
        cfg = get_pretrained_cfg(backbone) or PretrainedCfg()
        if not cfg.architecture and is_model(backbone):  # an old name, such as tv_resnet34, of which timm warns
            cfg = PretrainedCfg(**getattr(create_model(backbone, device='meta'), 'pretrained_cfg', {}))
        if is_packaged(cfg) and backbone.startswith('regnet_reg_'):
            if pretrained:
                told = "a plain network is expected, such as 'cifar_resnet20' or 'resnet50'"
                raise ValueError(f'backbone={backbone!r} was given, which has weights of a regulated network: {told}.')
            cfg = replace(cfg, file=None, label_names=None)
        kwargs['pretrained_cfg'] = (
            warm_start_cfg('regnet_reg', cfg) if cfg.has_weights else replace(cfg, architecture='regnet_reg')
        )
    return _create(_regulated, 'regnet_reg', model_args, pretrained, **kwargs)
