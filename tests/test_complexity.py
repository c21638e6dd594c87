"""Parameters, FLOPs and training memory, computed without running a model."""
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import use_stock_classes
from convnext_mm import UserError, complexity
from convnext_mm.engine import memory
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT, call_tool, saved_by
from tests.recipes import RECIPES


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if 'tiny' in name else pytest.mark.slow)
    for name in RECIPES if not name.endswith(('_ss', '_ms'))])
def test_flops_match_the_published_ones(name):
    published = RECIPES[name][-1]
    result = complexity.compute_complexity(Config.fromfile(ROOT / 'configs' / f'{name}.py'))
    tolerance = 0.01 if name.startswith('upernet') else 0.02
    assert result.flops / 1e9 == pytest.approx(published, rel=tolerance)
    assert result.size == ((2560, 640) if '_640_' in name else (2048, 512)
                            ) if name.startswith('upernet') else (1280, 800)


def test_flops_are_those_of_a_real_run():
    """The demo's segmentor has the same operations on the meta device and with real tensors.

    Counted are mmseg's, as in the papers; our heads need fewer.
    """
    cfg = Config.fromfile(DEMO_SEGMENTATION)
    result = complexity.compute_complexity(cfg, (128, 96))
    cfg.model.backbone.memory = 'plain'  # the counter does not support fused operations
    use_stock_classes(cfg.model)
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 96, 128), mode='tensor')
    with torch.no_grad(), FlopCounterMode(display=False) as backbone:
        model.backbone(torch.zeros(1, 3, 96, 128))
    assert result == (sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2,
                      backbone.get_total_flops() // 2, (128, 96))


def test_roi_heads_use_the_authors_number_of_rois(monkeypatch):
    total = complexity.compute_complexity(Config.fromfile(DEMO_DETECTION)).flops
    monkeypatch.setattr(complexity, 'PROPOSALS', 0)
    without_boxes = complexity.compute_complexity(Config.fromfile(DEMO_DETECTION)).flops
    monkeypatch.setattr(complexity, 'MASKS', 0)
    without_heads = complexity.compute_complexity(Config.fromfile(DEMO_DETECTION)).flops
    cfg = Config.fromfile(DEMO_DETECTION)
    head = cfg.model.roi_head.bbox_head[0]
    first = 64 * 32 * 9 * 49  # four convolutions, a linear layer, classes and boxes
    per_box = first + 3 * 32 * 32 * 9 * 49 + 32 * 49 * 256 + 256 * (head.num_classes * 5 + 1)
    assert total - without_boxes == 3 * 1000 * per_box
    per_mask = (first * 4 + 3 * 32 * 32 * 9 * 196 + 32 * 32 * 4 * 196 + 32 * 4 * 784)
    assert without_boxes - without_heads == 3 * 100 * per_mask


def test_the_tool_accepts_custom_configs_and_sizes():
    done = call_tool('tools/model_table.py', DEMO_SEGMENTATION, '--size', '320x160')
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith('| `upernet_convnext_demo` | 2.57M | ')
    assert done.stdout.endswith('| 320×160 |\n')
    done = call_tool('tools/model_table.py', 'configs/nothing.py')
    assert done.returncode == 2
    assert done.stderr.startswith('\nError: Config not found')


def test_estimated_memory_matches_the_saved_tensors_of_a_real_run():
    cfg = Config.fromfile(DEMO_SEGMENTATION)
    cfg.model.backbone.memory = 'plain'
    estimate = complexity.estimate_training_memory(cfg, batch_size=2)
    model = MODELS.build(cfg.model).train()
    assert estimate.states == 16 * sum(p.numel() for p in model.parameters())
    classes, area = 8, 2 * 128 * 128
    assert estimate.loss == 4 * 4 * classes * area, 'logits of two heads, and two more maps'

    def forward():
        features = model.extract_feat(torch.zeros(2, 3, 128, 128))
        return model.decode_head(features), model.auxiliary_head(features)
    # The dtypes of the norms' statistics differ.
    assert estimate.activations == pytest.approx(
        saved_by(forward, list(model.parameters()), True) * 2**20, rel=0.003)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'limit'), [('large_640', 8.0), ('xlarge_640', 14.0)])
def test_large_recipes_fit_the_memory_of_common_gpus(name, limit):
    cfg = Config.fromfile(ROOT / 'configs' / f'upernet_convnext_{name}_160k_ade20k.py')
    lean = complexity.estimate_training_memory(cfg).total
    assert lean / 1e9 <= limit
    cfg.model.backbone.memory = 'minimal'
    assert complexity.estimate_training_memory(cfg).total < lean


def test_memory_of_detectors_grows_with_the_sampled_rois():
    def estimate(**sampler):
        cfg = Config.fromfile(DEMO_DETECTION)
        for stage in cfg.model.train_cfg.rcnn:
            stage.sampler.update(sampler)
        return complexity.estimate_training_memory(cfg, batch_size=2)
    without = estimate(num=0)
    boxes, both = (estimate(num=64, pos_fraction=share).activations - without.activations
                   for share in (0.0, 0.25))
    assert without.loss == 0
    # Three heads save, of each RoI, at least four maps of 32 channels and 49 pixels in bf16.
    assert boxes > 3 * 2 * 64 * 4 * 32 * 49 * 2
    assert both > boxes


def test_memory_of_other_models_is_refused():
    cfg = Config.fromfile(DEMO_DETECTION)
    del cfg.model.roi_head
    with pytest.raises(UserError, match='for segmentors and two-stage detectors only, not for '
                       'CascadeRCNN'):
        complexity.estimate_training_memory(cfg)


def test_estimated_memory_of_inference_is_that_of_weights_and_largest_maps():
    """A chain of two convolutions: input and output of one of them are alive at once."""
    with torch.no_grad(), memory._Peak() as tensors:
        x = torch.empty(1, 3, 8, 8, device='meta')
        x = torch.ops.aten.mul(x, 2)
        for channels in (16, 4):
            x = torch.nn.functional.conv2d(x, x.new_empty(channels, x.shape[1], 1, 1))
    assert tensors.peak == 4 * (64 * (16 + 4) + 16 * 4)
    small, middle, large = (
        memory.estimate_inference_memory(Config.fromfile(DEMO_SEGMENTATION), (side, side), {})
        for side in (256, 512, 1024))
    assert (large - middle) / (middle - small) == pytest.approx(4, rel=0.01)
