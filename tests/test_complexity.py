"""Counting without running."""
import pytest
import torch
from mmengine.config import Config

from convnext_mm import complexity
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT, run_tool
from tests.recipes import RECIPES


@pytest.mark.parametrize('name', [n for n in RECIPES if not n.endswith(('_ss', '_ms'))])
def test_flops_are_the_published_ones(name):
    published = RECIPES[name][-1]
    counted = complexity.compute_complexity(Config.fromfile(ROOT / 'configs' / f'{name}.py'))
    bar = 0.01 if name.startswith('upernet') else 0.02
    assert counted.flops / 1e9 == pytest.approx(published, rel=bar)
    assert counted.size == ((2560, 640) if '_640_' in name else (2048, 512)
                            ) if name.startswith('upernet') else (1280, 800)


def test_the_count_is_that_of_a_run():
    """On the meta device and with numbers, the demo's segmentor takes the same operations."""
    from mmengine.registry import MODELS
    from torch.utils.flop_counter import FlopCounterMode
    cfg = Config.fromfile(DEMO_SEGMENTATION)
    counted = complexity.compute_complexity(cfg, (128, 96))
    cfg.model.backbone.memory = 'plain'  # the counter knows no fused operations
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 96, 128), mode='tensor')
    assert counted == (sum(p.numel() for p in model.parameters()),
                       counter.get_total_flops() // 2, (128, 96))


def test_roi_heads_are_counted_by_the_authors_number_of_rois(monkeypatch):
    whole = complexity.compute_complexity(Config.fromfile(DEMO_DETECTION)).flops
    monkeypatch.setattr(complexity, 'PROPOSALS', 0)
    without_boxes = complexity.compute_complexity(Config.fromfile(DEMO_DETECTION)).flops
    monkeypatch.setattr(complexity, 'MASKS', 0)
    without_heads = complexity.compute_complexity(Config.fromfile(DEMO_DETECTION)).flops
    cfg = Config.fromfile(DEMO_DETECTION)
    head = cfg.model.roi_head.bbox_head[0]
    first = 64 * 32 * 9 * 49  # four convolutions, the layer behind them, class and box
    a_box = first + 3 * 32 * 32 * 9 * 49 + 32 * 49 * 256 + 256 * (head.num_classes * 5 + 1)
    assert whole - without_boxes == 3 * 1000 * a_box
    a_mask = (first * 4 + 3 * 32 * 32 * 9 * 196 + 32 * 32 * 4 * 196 + 32 * 4 * 784)
    assert without_boxes - without_heads == 3 * 100 * a_mask


def test_the_tool_takes_ones_own_configs_and_sizes():
    done = run_tool('tools/model_table.py', DEMO_SEGMENTATION, '--size', '320x160')
    assert done.stdout.splitlines()[-1].startswith('| `upernet_convnext_demo` | 2.57M | ')
    assert done.stdout.endswith('| 320×160 |\n')
    done = run_tool('tools/model_table.py', 'configs/nothing.py', check=False)
    assert done.returncode == 2
    assert 'Config not found' in done.stderr
    assert 'Traceback' not in done.stderr


def test_memory_is_reckoned_from_what_autograd_keeps():
    """On tensors without values as with them: the demo's segmentor, layer after layer."""
    from mmengine.registry import MODELS

    from tests.helpers import saved_by
    cfg = Config.fromfile(DEMO_SEGMENTATION)
    cfg.model.backbone.memory = 'plain'
    found = complexity.estimate_training_memory(cfg, pictures=2)
    model = MODELS.build(cfg.model).train()
    assert found.states == 16 * sum(p.numel() for p in model.parameters())
    classes, area = 8, 2 * 128 * 128
    assert found.loss == 4 * 4 * classes * area, 'of two heads, and twice of one'

    def forward():
        features = model.extract_feat(torch.zeros(2, 3, 128, 128))
        return model.decode_head(features), model.auxiliary_head(features)
    # Norms' statistics are of other dtypes there: a five-hundredth.
    assert found.activations == pytest.approx(
        saved_by(forward, list(model.parameters()), True) * 2**20, rel=0.003)


@pytest.mark.parametrize(('name', 'limit'), [('large_640', 8.0), ('xlarge_640', 14.0)])
def test_what_a_card_can_train(name, limit):
    cfg = Config.fromfile(ROOT / 'configs' / f'upernet_convnext_{name}_160k_ade20k.py')
    lean = complexity.estimate_training_memory(cfg).total
    assert lean / 1e9 <= limit
    cfg.model.backbone.memory = 'minimal'
    assert complexity.estimate_training_memory(cfg).total < lean


def test_memory_of_detectors_is_not_reckoned():
    from convnext_mm import UserError
    with pytest.raises(UserError, match='for segmentors only'):
        complexity.estimate_training_memory(Config.fromfile(DEMO_DETECTION))
