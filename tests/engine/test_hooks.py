"""Hooks that draw figures during a run."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from convnext_mm.engine import hooks
from tests.helpers import log_line, write_log


def test_a_failed_figure_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(figure, path):
        raise OSError('No space left on device')
    logged = []
    monkeypatch.setattr('convnext_mm.visualization.save_figure', fail)
    monkeypatch.setattr(hooks, 'print_log', lambda text, **kwargs: logged.append(text))
    write_log(tmp_path / '20260101_000000', [log_line(10)])
    hooks.CurvesHook().after_train(SimpleNamespace(work_dir=str(tmp_path)))
    assert logged == ['Cannot draw: OSError: No space left on device']


@pytest.mark.parametrize('batch_size', [1, 5])
def test_drawn_images_are_spread_over_the_data_set(batch_size, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(hooks, 'draw_sample',
                        lambda sample, meta, path, **_: drawn.append(path.stem))
    samples = [SimpleNamespace(img_path=f'{i}.jpg') for i in range(20)]
    loader = SimpleNamespace(dataset=samples, batch_size=batch_size)
    runner = SimpleNamespace(work_dir=str(tmp_path), val_loop=SimpleNamespace(dataloader=loader),
                             visualizer=SimpleNamespace(dataset_meta=dict(classes=('a', 'b'))))
    hook = hooks.PredictionsHook(num_pictures=4)
    for batch in range(20 // batch_size):
        hook.after_val_iter(runner, batch,
                            outputs=samples[batch * batch_size:(batch + 1) * batch_size])
    assert drawn == ['0', '5', '10', '15']


@pytest.mark.parametrize('dtype', [torch.long, torch.float32])
def test_classes_that_no_prediction_names(dtype, monkeypatch):
    logged = []
    monkeypatch.setattr(hooks, 'print_log', lambda text, **kwargs: logged.append(text))
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c', 'd')))
    runner = SimpleNamespace(val_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset)))
    hook = hooks.AbsentClassesHook()
    for labels in ([0, 0, 2], [2, 2, 2]):
        mask = PixelData(data=torch.tensor(labels, dtype=dtype).view(1, 1, 3))
        hook.after_val_iter(runner, 0, outputs=[BaseDataElement(pred_sem_seg=mask)])
    assert logged == []
    hook.after_val_epoch(runner)
    assert logged == ['No prediction names 2 of 4 classes: b, d']
    boxes = InstanceData(labels=torch.tensor([3, 1, 0, 2]))
    hook.after_val_iter(runner, 0, outputs=[BaseDataElement(pred_instances=boxes)])
    hook.after_val_epoch(runner)
    assert len(logged) == 1
