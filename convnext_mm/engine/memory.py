"""The memory of a training step, estimated without running it, and what to do when it is short."""
from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import UserError
from ..options import MEMORY
from .building import build_on_meta


class TrainingMemory(NamedTuple):
    """Estimated peak memory of a training step, in bytes.

    Workspaces of convolutions, half-precision copies of weights and fragmentation are not included.

    Args:
        states: Weights and gradients in fp32, and both moments of AdamW.
        activations: Activations that backbone and heads save for the backward pass.
        loss: Logits of each head at image size, which cross-entropy saves, and two more maps
            during the backward pass of the decode head's loss.
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
    """Estimate the memory that training a segmentor needs, from the tensors that autograd saves.

    Args:
        cfg: A segmentor's config; changed by :func:`build_on_meta`.
        batch_size: Images per GPU, each as large as a crop.
        mixed_precision: Whether forward and backward pass use mixed precision.

    Raises:
        UserError: The model is not a segmentor.
    """
    if 'decode_head' not in cfg.model:
        raise UserError('The training memory can be estimated for segmentors only: that of a '
                        'detector depends on the objects in the images')
    cfg.model.backbone.drop_path_rate = 0.0  # the peak is reached when no branch is dropped
    width, height = tuple(cfg.model.data_preprocessor.size)[::-1]
    model: Any = build_on_meta(cfg).train()
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address could be used again

    def record(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor
    # Autocast does not support meta tensors. Fake tensors have no values either, but a device.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device='cpu')
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        images = torch.empty(batch_size, cfg.model.backbone.get('in_chans', 3), height, width)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), \
                torch.autocast('cpu', torch.bfloat16, enabled=mixed_precision):
            features = model.extract_feat(images)
            heads = [head for head in (model.decode_head, getattr(model, 'auxiliary_head', None))
                     if head is not None]
            logits = [head(features) for head in heads]
    logit_bytes = [4 * batch_size * width * height * one.shape[1] for one in logits]
    return TrainingMemory(states=16 * sum(p.numel() for p in model.parameters()),
                          activations=sum(size for key, size in saved.items() if key not in own),
                          loss=sum(logit_bytes) + 2 * logit_bytes[0])


def memory_advice(cfg: Config) -> str:
    """What to change in a config whose training needs too much memory.

    Args:
        cfg: The config of the run; it stays as it is.

    Returns:
        Options from the one that costs least; of a segmentor, with estimates for the images of a
        process and each of the backbone's ``memory``.
    """
    loader = cfg.get('train_dataloader') or {}
    batch = loader.get('batch_size') or 1
    lines = ['model.backbone.memory=lean, or minimal, which saves less and computes it again']
    try:
        amp = 'Amp' in str((cfg.get('optim_wrapper') or {}).get('type'))
        estimates = ', '.join(f'{kind} {_estimate(cfg, kind, batch, amp) / 1e9:.2f} GB'
                              for kind in MEMORY)
        lines[0] += f'. Estimated for {batch} images: {estimates}'
    except Exception:  # of a model that cannot be estimated, such as a detector
        pass
    if batch > 1:
        lines.append(f'train_dataloader.batch_size={batch // 2} and '
                     'optim_wrapper.accumulative_counts=2, which updates as often as before')
    lines += ['--amp: activations in half precision',
              'smaller images: crop_size, or the scale of a detector',
              'model.backbone.with_cp=True: activation checkpointing of every block']
    return 'Any of these needs less memory:' + ''.join(f'\n  {line}' for line in lines)


def _estimate(cfg: Config, kind: str, batch: int, amp: bool) -> int:
    cfg = deepcopy(cfg)
    cfg.model.backbone.memory = kind
    with torch.backends.mkldnn.flags(enabled=False):  # its operators know no fake tensors
        return estimate_training_memory(cfg, batch, amp).total
