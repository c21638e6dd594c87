"""Builds what a config describes, without data, weights or memory, before anything starts."""
from __future__ import annotations

import functools
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import (
    METRICS,
    MODELS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    init_default_scope,
)
from torch import nn
from torch.overrides import TorchFunctionMode

from ..backbone import ConvNeXt
from ..errors import UserError
from ..utils import describe
from . import fallbacks

SPLITS = ('train', 'val', 'test')


class Parts(NamedTuple):
    """A model on the meta device, and the optimizer wrapper of a config that trains."""

    model: nn.Module
    optim_wrapper: OptimWrapper | None


class OnMeta(TorchFunctionMode):
    """The meta device, except for rates of stochastic depth, whose values models read at once."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs.setdefault('device', 'cpu')
        with torch.device('meta'):
            return func(*args, **kwargs)


def build_on_meta(cfg: Config) -> nn.Module:
    """Build the config's model on the meta device, without memory for its parameters.

    ``cfg`` is adapted to the device (:func:`convnext_mm.engine.fallbacks.adapt_to_device`).
    """
    fallbacks.adapt_to_device(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with OnMeta(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # from mmseg's losses, which are not used here
        return MODELS.build(cfg.model)


def build_parts(cfg: Config) -> Parts:
    """Build the model, and the optimizer wrapper with its parameter groups.

    Args:
        cfg: A resolved config; it stays as it is.

    Raises:
        UserError: One of them cannot be built; names its key of the config and the cause.
    """
    cfg = deepcopy(cfg)
    fallbacks.adapt_to_device(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with _silently():
        model = _build('model', lambda: _run_once(cfg, MODELS.build(deepcopy(cfg.model))))
        wrapper = None
        if cfg.get('optim_wrapper') and cfg.get('train_cfg'):
            wrapper = _build('optim_wrapper',
                             lambda: build_optim_wrapper(model, deepcopy(cfg.optim_wrapper)))
    return Parts(model, wrapper)


def build_all(cfg: Config) -> Parts:
    """Build the model, the optimizer wrapper, pipelines, evaluators and schedulers.

    Args:
        cfg: A resolved config; it stays as it is.

    Raises:
        UserError: One of them cannot be built; names its key of the config and the cause.
    """
    parts = build_parts(cfg)
    cfg = deepcopy(cfg)
    with _silently():
        pipelines = {f'{split}_dataloader.dataset.pipeline': pipeline for split in SPLITS
                     for pipeline in find_pipelines(cfg.get(f'{split}_dataloader') or {})}
        pipelines['tta_pipeline'] = cfg.get('tta_pipeline') or []
        for path, pipeline in pipelines.items():
            for i, step in enumerate(pipeline):
                _build(f'{path}.{i}', functools.partial(TRANSFORMS.build, step))
        for split in SPLITS[1:]:
            evaluators = cfg.get(f'{split}_evaluator') or []
            for one in evaluators if isinstance(evaluators, list) else [evaluators]:
                # Annotations are read when a run begins.
                settings = dict(one, ann_file=None) if 'ann_file' in one else dict(one)
                _build(f'{split}_evaluator', functools.partial(METRICS.build, settings))
        if parts.optim_wrapper is not None:
            _build_schedulers(cfg, parts.optim_wrapper.optimizer)
    return parts


def find_pipelines(node: Any) -> Iterator[list[dict[str, Any]]]:
    """The pipelines of a data loader's data set and of those inside it."""
    if isinstance(node, dict):
        if isinstance(node.get('pipeline'), list):
            yield node['pipeline']
        for value in node.values():
            yield from find_pipelines(value)
    elif isinstance(node, list):
        for value in node:
            yield from find_pipelines(value)


def _build_schedulers(cfg: Config, optimizer: torch.optim.Optimizer) -> None:
    """Build the schedulers; they write to ``optimizer``."""
    configs = cfg.get('param_scheduler') or []
    for i, one in enumerate(configs if isinstance(configs, (list, tuple)) else [configs]):
        settings = {k: v for k, v in one.items() if k != 'convert_to_iter_based'}
        _build(f'param_scheduler.{i}', functools.partial(
            PARAM_SCHEDULERS.build, settings, default_args=dict(optimizer=optimizer)))


@torch.no_grad()
def _run_once(cfg: Config, model: Any) -> nn.Module:
    """Run the parts of a model that need no data samples, so that their sizes must agree."""
    with suppress(NotImplementedError):  # an operator that this device does not have
        _run_parts(cfg, model.eval(), next(model.parameters()).device)
    return model.train()


def _run_parts(cfg: Config, model: Any, device: torch.device) -> None:
    """Run backbone, neck and heads.

    Raises:
        ValueError: Neck or head does not fit the maps that it gets.
        NotImplementedError: The device has no such operator.
    """
    backbone, bands = getattr(model, 'backbone', None), cfg.model.get('backbone') or {}
    if backbone is None or not _takes_one_argument(getattr(model, 'extract_feat', None)):
        return
    size = (cfg.model.get('data_preprocessor') or {}).get('size') or (
        (64, 64) if device.type == 'cpu' else (512, 512))
    images = torch.zeros(2, bands.get('in_chans', bands.get('in_channels', 3)), *size,
                         device=device)
    try:
        maps = backbone(images)
    except Exception:  # such as another's of a fixed size, or with operators of CUDA
        if isinstance(backbone, ConvNeXt):
            raise
        return
    with _naming('neck', maps):
        features = model.extract_feat(images)
    for name in ('decode_head', 'auxiliary_head', 'rpn_head'):
        for head in _as_list(getattr(model, name, None)):
            if _takes_one_argument(head.forward):
                with _naming(name, features):
                    head(features)
    for kind in ('bbox', 'mask'):
        run_roi_heads(model, kind, 2, device)


@contextmanager
def _naming(part: str, maps: Any) -> Iterator[None]:
    """Let an error name the part of the model, and the maps that it gets."""
    try:
        yield
    except NotImplementedError:
        raise
    except Exception as error:
        if 'implementation for device' in str(error):  # of mmcv's operators
            raise NotImplementedError(str(error)) from error
        channels = [one.shape[1] for one in maps
                    if isinstance(one, torch.Tensor) and one.dim() > 1]
        raise ValueError(f'model.{part} does not fit maps of {channels} channels, see its '
                         f'in_channels and in_index ({describe(error)})') from error


def _takes_one_argument(method: Any) -> bool:
    """Whether a method can be called with maps or images alone."""
    return callable(method) and sum(
        one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        for one in inspect.signature(method).parameters.values()) == 1


def run_roi_heads(model: Any, kind: str, rois: int, device: torch.device) -> None:
    """Run each 'bbox' or 'mask' head of a detector on maps of ``rois`` RoIs, without RoIAlign.

    Heads that read something else as well are left out.
    """
    roi_head = getattr(model, 'roi_head', None)
    heads, extractors = (_as_list(getattr(roi_head, f'{kind}_{part}', None))
                         for part in ('head', 'roi_extractor'))
    if getattr(roi_head, 'with_shared_head', False):  # a part of the backbone, before the heads
        return
    for one, extractor in zip(heads, extractors, strict=False):
        if not _takes_one_argument(one.forward):
            continue
        one(torch.zeros(rois, extractor.out_channels, *extractor.roi_layers[0].output_size,
                        device=device))


def _as_list(part: Any) -> list[Any]:
    return list(part) if isinstance(part, nn.ModuleList) else [] if part is None else [part]


def learning_rates(cfg: Config) -> tuple[float, float]:
    """The first and the last learning rate of a run, for a parameter group without decay.

    Computed with mmengine's own schedulers. Those that count iterations beside a run of epochs,
    such as a warm-up, run to their end.

    Raises:
        UserError: A scheduler cannot be built; names its key of the config and the cause.
    """
    base = float(cfg.optim_wrapper.optimizer.get('lr', 0.0))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=base)
    configs = cfg.get('param_scheduler') or []
    schedulers: dict[bool, list[Any]] = {True: [], False: []}
    for i, one in enumerate(configs if isinstance(configs, (list, tuple)) else [configs]):
        settings = {k: v for k, v in one.items() if k != 'convert_to_iter_based'}
        built = _build(f'param_scheduler.{i}', functools.partial(
            PARAM_SCHEDULERS.build, settings, default_args=dict(optimizer=optimizer)))
        if getattr(built, 'param_name', 'lr') == 'lr':
            schedulers[bool(built.by_epoch)].append(built)
    length = cfg.train_cfg.get('max_iters'), cfg.train_cfg.get('max_epochs')
    ends = [s.end for s in schedulers[False] if s.end < 10**8]
    iterations = length[0] or max(ends, default=0) + 1

    def run() -> tuple[float, float]:
        first = last = optimizer.param_groups[0]['lr']
        for by_epoch, steps in ((False, iterations), (True, length[1] or 0)):
            for _ in range(steps):
                last = optimizer.param_groups[0]['lr']
                for scheduler in schedulers[by_epoch]:
                    scheduler.step()
        return first, last
    with _silently():
        return _build('param_scheduler', run)


def _build(path: str, build: Callable[[], Any]) -> Any:
    """Build on the meta device; where a part cannot be, on the CPU."""
    failure: Exception | None = None
    for device in (OnMeta(), nullcontext()):
        try:
            with device:
                return build()
        except UserError:
            raise
        except Exception as error:  # a part of a toolbox or of a user can raise anything
            failure = failure or error
    assert failure is not None
    raise UserError(f'{path} cannot be built: {describe(failure)}') from failure


@contextmanager
def _silently() -> Iterator[None]:
    """Without log messages and warnings: those of the run itself follow."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)  # logging.disable does not reach mmengine's loggers
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
