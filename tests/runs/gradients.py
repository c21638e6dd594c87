"""The gradients of the recipes on a global batch: of one process, and of several together."""
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from convnext_mm.engine.checks import read_config
from convnext_mm.engine.fallbacks import adapt_to_device
from convnext_mm.engine.sharding import divide
from convnext_mm.runs.shards import whole
from tests.helpers import DETECTION, SEGMENTATION

CONFIGS = {'segmentation': SEGMENTATION, 'detection': DETECTION}
BATCH = 4
SIZE = 96


def build(task: str, options: dict[str, Any]) -> nn.Module:
    """A recipe's model in training mode, without what makes the parts of a batch depend on it.

    Drop path and dropout draw numbers; batch normalization, which is SyncBN on GPUs, averages over
    the batch of a process on a CPU: its statistics are fixed. mmdet divides losses by the number of
    samples of a process: each image has as many anchors and boxes, of which as many are positive.
    """
    cfg = read_config(CONFIGS[task], {
        'model.backbone.init_cfg': None, 'model.backbone.drop_path_rate': 0.0, **options}, [])
    adapt_to_device(cfg)
    init_default_scope(cfg.default_scope)
    if task == 'detection':
        from mmdet.models.task_modules.samplers import RandomSampler
        RandomSampler.random_choice = lambda self, gallery, num: gallery[:num]
        cfg.model.train_cfg.rpn.sampler.num = 8
        for stage in cfg.model.train_cfg.rcnn:
            stage.sampler.num = 32
            stage.assigner.update(pos_iou_thr=0.999, neg_iou_thr=0.999, min_pos_iou=0.999)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for part in list(model.modules()):
        if isinstance(part, nn.Dropout2d):
            part.p = 0.0
        # The order of sums decides on which side of 0 a few of a million inputs of ReLU are, and
        # each of these changes the gradient of a layer by a relative 1e-3.
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.GELU())
    model.train()
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    return model


def batch(task: str, start: int, stop: int) -> dict[str, Any]:
    """Some images of the global batch, with their annotations, as a data loader gives them."""
    samples: list[Any] = []
    meta = dict(img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE),
                batch_input_shape=(SIZE, SIZE), scale_factor=(1.0, 1.0))
    images = []
    for index in range(start, stop):
        generator = torch.Generator().manual_seed(index)
        images.append(torch.randint(0, 256, (3, SIZE, SIZE), generator=generator,
                                    dtype=torch.uint8))
        if task == 'segmentation':
            from mmengine.structures import PixelData
            from mmseg.structures import SegDataSample
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, SIZE, SIZE),
                                                             generator=generator))
        else:
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks
            from mmengine.structures import InstanceData
            corners = torch.randint(0, SIZE - 32, (3, 2), generator=generator).float()
            masks = torch.randint(0, 2, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
            sample = DetDataSample(metainfo=meta)
            sample.gt_instances = InstanceData(
                bboxes=torch.cat([corners, corners + 30], 1), labels=torch.tensor([0, 7, 79]),
                masks=BitmapMasks(masks.numpy(), SIZE, SIZE))
            sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


class Losses(nn.Module):
    """From a batch to its loss, as a module's forward, which DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, data: dict[str, Any]) -> Tensor:
        data = self.model.data_preprocessor(data, True)
        return self.model.parse_losses(self.model(**data, mode='loss'))[0]


def compare(task: str, options: dict[str, Any], shard: bool = False) -> tuple[float, float]:
    """In each process of a group: the difference to one process with the whole batch.

    Returns:
        Relative, of the loss and of the gradient of all parameters, in the Euclidean norm.
    """
    rank, processes = dist.get_rank(), dist.get_world_size()
    module = Losses(build(task, options))
    loss = module(batch(task, 0, BATCH))
    loss.backward()
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    if shard:
        divide(module, torch.optim.SGD(module.parameters(), 0.1), find_unused_parameters=True)
    wrapped = module if shard else DistributedDataParallel(module, find_unused_parameters=True)
    share = BATCH // processes
    mean = wrapped(batch(task, rank * share, (rank + 1) * share))
    mean.backward()
    mean = mean.detach() / processes
    dist.all_reduce(mean)
    gradients = {name: whole(p.grad) for name, p in module.named_parameters()
                 if p.grad is not None}
    assert gradients.keys() == expected.keys()
    assert len(gradients) > 50, 'nothing is left out'
    error = {name: float((gradients[name] - one).norm()) for name, one in expected.items()}
    size = {name: float(one.norm()) for name, one in expected.items()}
    total = sum(value**2 for value in size.values())**0.5
    return (abs(float(mean) / float(loss.detach()) - 1),
            sum(value**2 for value in error.values())**0.5 / total)
