"""The memory of a training step, estimated without running it, and what to do when it is short."""
from __future__ import annotations

import weakref
from collections import Counter
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UserError
from ..options import MEMORY
from .building import build_on_meta, run_roi_heads


class TrainingMemory(NamedTuple):
    """Estimated peak memory of a training step, in bytes.

    Workspaces of convolutions, half-precision copies of weights and fragmentation are not included.

    Args:
        states: Weights and gradients in fp32, and both moments of AdamW.
        activations: Activations that backbone and heads save for the backward pass.
        loss: A segmentor's logits of each head at image size, which cross-entropy saves, and two
            more maps during the backward pass of the decode head's loss.
    """

    states: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self)


def estimate_training_memory(cfg: Config, batch_size: int = 2,
                             mixed_precision: bool = True) -> TrainingMemory:
    """Estimate the memory that a training step needs, from the tensors that autograd saves.

    Args:
        cfg: A config of a segmentor or a two-stage detector; changed by :func:`build_on_meta`.
        batch_size: Images per GPU, each as large as a crop, or as the test scale of a detector,
            whose heads get as many RoIs as its sampler draws at most.
        mixed_precision: Whether forward and backward pass use mixed precision.

    Raises:
        UserError: The model is neither.
    """
    cfg.model.backbone.drop_path_rate = 0.0  # the peak is reached when no branch is dropped
    if 'decode_head' in cfg.model:
        width, height = tuple(cfg.model.data_preprocessor.size)[::-1]
    elif 'roi_head' in cfg.model:
        width, height = (-(-side // 32) * 32 for side in _test_scale(cfg))
    else:
        raise UserError('The training memory can be estimated for segmentors and two-stage '
                        f'detectors only, not for {cfg.model.get("type")}')
    model: Any = build_on_meta(cfg).train()
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be used again

    def record(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor
    # Autocast does not support meta tensors. Fake tensors have no values either, but a device.
    # oneDNN's operators know none of them.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.backends.mkldnn.flags(enabled=False):
        model.to_empty(device='cpu')
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        images = torch.empty(batch_size, cfg.model.backbone.get('in_chans', 3), height, width)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), \
                torch.autocast('cpu', torch.bfloat16, enabled=mixed_precision):
            features = model.extract_feat(images)
            logits = []
            if 'decode_head' in cfg.model:
                heads = model.decode_head, getattr(model, 'auxiliary_head', None)
                logits = [head(features) for head in heads if head is not None]
            else:
                model.rpn_head(features)
                for kind, rois in _sampled_rois(cfg).items():
                    run_roi_heads(model, kind, batch_size * rois, images.device)
    logit_bytes = [4 * batch_size * width * height * one.shape[1] for one in logits]
    return TrainingMemory(states=16 * sum(p.numel() for p in model.parameters()),
                          activations=sum(size for key, size in saved.items() if key not in own),
                          loss=sum(logit_bytes) + 2 * sum(logit_bytes[:1]))


def _test_scale(cfg: Config) -> tuple[int, int]:
    """Width and height of a detector's test, which are those of its largest training images."""
    steps = cfg.test_dataloader.dataset.pipeline
    return next((tuple(step.scale) for step in steps if step.type == 'Resize'), (1333, 800))


def _sampled_rois(cfg: Config) -> dict[str, int]:
    """The RoIs of an image that box and mask heads are trained on, at most."""
    training = cfg.model.train_cfg.rcnn
    sampler = (training[0] if isinstance(training, (list, tuple)) else training).sampler
    return dict(bbox=sampler.num, mask=int(sampler.num * sampler.pos_fraction))


class _Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once; ``peak`` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.alive = 0
        self.users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._count(storage._cdata, storage.nbytes(), 1)
                weakref.finalize(tensor, self._count, storage._cdata, storage.nbytes(), -1)
        return out

    def _count(self, key: int, size: int, users: int) -> None:
        before = self.users[key] > 0
        self.users[key] += users
        self.alive += size * ((self.users[key] > 0) - before)
        self.peak = max(self.peak, self.alive)


def estimate_inference_memory(cfg: Config, size: tuple[int, int], rois: dict[str, int]) -> int:
    """Estimate the bytes that inference on one image needs, in fp32: weights and feature maps.

    Workspaces of convolutions and logits at image size are not included.

    Args:
        cfg: A config of a segmentor or a two-stage detector; changed by :func:`build_on_meta`.
        size: Width and height of the image.
        rois: RoIs of a detector's 'bbox' and 'mask' heads.
    """
    model: Any = build_on_meta(cfg).eval()
    image = torch.empty(1, cfg.model.backbone.get('in_chans', 3), *size[::-1], device='meta')
    with torch.no_grad(), _Peak() as tensors:
        features = model.extract_feat(image)
        if 'decode_head' in cfg.model:
            model.decode_head(features)
        else:
            model.rpn_head(features)
            for kind, count in rois.items():
                run_roi_heads(model, kind, count, image.device)
    return tensors.peak + sum(4 * p.numel() for p in model.parameters())


def memory_advice(cfg: Config) -> str:
    """What to change in a config whose training needs too much memory.

    Args:
        cfg: The config of the run; it stays as it is.

    Returns:
        Options from the one that costs least, with estimates for the images of a process and each
        of the backbone's ``memory``, where there are any.
    """
    loader = cfg.get('train_dataloader') or {}
    batch = loader.get('batch_size') or 1
    lines = ['model.backbone.memory=lean, or minimal, which saves less and computes it again']
    try:
        amp = 'Amp' in str((cfg.get('optim_wrapper') or {}).get('type'))
        estimates = ', '.join(f'{kind} {_estimate(cfg, kind, batch, amp) / 1e9:.2f} GB'
                              for kind in MEMORY)
        lines[0] += f'. Estimated for {batch} images: {estimates}'
    except Exception:  # of a model that cannot be estimated
        pass
    if batch > 1:
        lines.append(f'train_dataloader.batch_size={batch // 2} and '
                     'optim_wrapper.accumulative_counts=2')
    lines += ['--amp: activations in half precision',
              'smaller images: crop_size, or the scale of a detector',
              'model.backbone.with_cp=True: activation checkpointing of every block']
    return 'Any of these needs less memory:' + ''.join(f'\n  {line}' for line in lines)


def _estimate(cfg: Config, kind: str, batch: int, amp: bool) -> int:
    cfg = deepcopy(cfg)
    cfg.model.backbone.memory = kind
    return estimate_training_memory(cfg, batch, amp).total
