"""Whole runs of the tools, as a user types them, on a few pictures."""
import json
import re

import pytest
import torch

from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    DETECTION,
    SEGMENTATION,
    SMALL_DETECTION,
    SMALL_SEGMENTATION,
    run_tool,
)


@pytest.fixture(scope='module')
def segmentation_run(demo_data, tmp_path_factory):
    """A small segmentation run: its work dir and what it printed."""
    work_dir = tmp_path_factory.mktemp('segmentation')
    done = run_tool('tools/train.py', DEMO_SEGMENTATION, '--work-dir', work_dir, '--amp',
                    '--cfg-options', f'data_root={demo_data}/ADEChallengeData2016',
                    *SMALL_SEGMENTATION)
    return work_dir, done.stdout + done.stderr


@pytest.fixture(scope='module')
def detection_run(demo_data, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('detection')
    done = run_tool('tools/train.py', DEMO_DETECTION, '--work-dir', work_dir, '--auto-scale-lr',
                    '--cfg-options', f'data_root={demo_data}/coco/', *SMALL_DETECTION)
    return work_dir, done.stdout + done.stderr


def test_segmentation_trains_and_leaves_its_pictures(segmentation_run):
    work_dir, said = segmentation_run
    assert said.count('No GPU here, running on the CPU: mixed precision → fp32, SyncBN → BN') == 1
    assert (work_dir / 'iter_4.pth').is_file()
    assert (work_dir / 'curves.png').stat().st_size > 10_000
    assert len(list((work_dir / 'predictions').glob('*.png'))) == 4
    assert 'Traceback' not in said
    assert 'stage_wise learning-rate decay 0.9' in said


def test_detection_trains_and_leaves_its_pictures(detection_run):
    work_dir, said = detection_run
    assert (work_dir / 'epoch_1.pth').is_file()
    assert (work_dir / 'curves.png').stat().st_size > 10_000
    assert len(list((work_dir / 'predictions').glob('*.png'))) == 4
    assert 'layer_wise learning-rate decay 0.7' in said
    assert re.search(r'LR is set based on batch size of 16 and the current batch size is 2', said)


def test_segmentation_resumes_where_it_stopped(segmentation_run, demo_data):
    work_dir, _ = segmentation_run
    options = [o for o in SMALL_SEGMENTATION if 'max_iters' not in o] + ['train_cfg.max_iters=6']
    done = run_tool('tools/train.py', DEMO_SEGMENTATION, '--work-dir', work_dir, '--resume',
                    '--cfg-options', f'data_root={demo_data}/ADEChallengeData2016', *options)
    said = done.stdout + done.stderr
    assert 'resumed epoch: 0, iter: 4' in said
    assert re.search(r'Iter\(train\) \[5/6\]', said)
    assert not re.search(r'Iter\(train\) \[4/6\]', said)


def test_segmentation_is_evaluated_with_tta_and_masks(segmentation_run, demo_data, tmp_path):
    work_dir, _ = segmentation_run
    done = run_tool('tools/test.py', DEMO_SEGMENTATION, work_dir / 'iter_4.pth',
                    '--work-dir', tmp_path / 'test', '--out', tmp_path / 'masks',
                    '--show-dir', tmp_path / 'shown', '--tta', '--cfg-options',
                    f'data_root={demo_data}/ADEChallengeData2016', *SMALL_SEGMENTATION)
    assert 'mIoU' in done.stdout + done.stderr
    assert len(list((tmp_path / 'masks').glob('*.png'))) == 4
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 4
    assert len(list((tmp_path / 'test' / 'predictions').glob('*.png'))) == 4
    assert (tmp_path / 'test' / 'curves.png').is_file(), 'drawn from the log by the checkpoint'


def test_detection_is_evaluated_with_tta_and_pickle(detection_run, demo_data, tmp_path):
    work_dir, _ = detection_run
    for extra, metric in (([], 'segm_mAP'), (['--tta'], 'bbox_mAP')):
        out = tmp_path / 'out.pkl'
        out.unlink(missing_ok=True)
        done = run_tool('tools/test.py', DEMO_DETECTION, work_dir / 'epoch_1.pth',
                        '--work-dir', tmp_path / 'test', '--out', out,
                        '--show-dir', tmp_path / 'shown', *extra, '--cfg-options',
                        f'data_root={demo_data}/coco/', *SMALL_DETECTION)
        assert out.is_file()
        assert metric in done.stdout + done.stderr
    assert len(list((tmp_path / 'shown').glob('*.jpg'))) == 4
    assert len(list((tmp_path / 'test' / 'predictions').glob('*.png'))) == 4


def test_two_processes_on_the_cpu(demo_data, tmp_path):
    done = run_tool('tools/dist_train.sh', DEMO_SEGMENTATION, '2', '--work-dir', tmp_path,
                    '--cfg-options', f'data_root={demo_data}/ADEChallengeData2016',
                    *SMALL_SEGMENTATION)
    said = done.stdout + done.stderr
    assert said.count('nccl → gloo') == 1
    assert 'Distributed training: True' in said
    checkpoint = torch.load(tmp_path / 'iter_4.pth', weights_only=False)
    assert not any(name.startswith('module.') for name in checkpoint['state_dict'])


def test_two_processes_evaluate_detection(detection_run, demo_data, tmp_path):
    work_dir, _ = detection_run
    done = run_tool('tools/dist_test.sh', DEMO_DETECTION, work_dir / 'epoch_1.pth', '2',
                    '--work-dir', tmp_path, '--cfg-options', f'data_root={demo_data}/coco/',
                    *SMALL_DETECTION)
    assert 'Epoch(test)' in done.stdout + done.stderr



@pytest.mark.parametrize(('toolbox', 'config', 'folder', 'small', 'checkpoint'), [
    ('mmseg', DEMO_SEGMENTATION, 'ADEChallengeData2016', SMALL_SEGMENTATION, 'iter_4.pth'),
    ('mmdet', DEMO_DETECTION, 'coco/', SMALL_DETECTION, 'epoch_1.pth')])
def test_configs_run_under_the_scripts_of_the_toolboxes(toolbox, config, folder, small, checkpoint,
                                                         demo_data, tmp_path):
    import importlib.util
    from pathlib import Path

    from mmengine.config import Config
    cfg = Config.fromfile(config)
    data = demo_data / folder
    # What our tools do by themselves on a CPU, written as a user of the others would.
    cfg.optim_wrapper.type = 'OptimWrapper'
    del cfg.optim_wrapper.loss_scale
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(data)
    if toolbox == 'mmdet':
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            evaluator.ann_file = str(data / 'annotations/instances_val2017.json')
    cfg.dump(tmp_path / 'config.py')
    scripts = Path(importlib.util.find_spec(toolbox).submodule_search_locations[0], '.mim/tools')
    run_tool(scripts / 'train.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'run',
             '--cfg-options', *small)
    assert len(list((tmp_path / 'run' / 'predictions').glob('*.png'))) == 4
    done = run_tool(scripts / 'test.py', tmp_path / 'config.py', tmp_path / 'run' / checkpoint,
                    '--work-dir', tmp_path / 'test', '--cfg-options', *small)
    assert ('mIoU' if toolbox == 'mmseg' else 'segm_mAP') in done.stdout + done.stderr


MISTAKES = [
    (('tools/train.py', SEGMENTATION), ['ADEChallengeData2016/images/training', 'make demo']),
    (('tools/train.py', DETECTION), ['instances_train2017.json', 'cocodataset.org', 'make demo']),
    (('tools/train.py', 'configs/nothing.py'), ['Config not found', 'nothing.py']),
    (('tools/train.py', SEGMENTATION, '--cfg-options', 'optim_wraper.type=OptimWrapper'),
     ['Did you mean optim_wrapper']),
    (('tools/test.py', DEMO_SEGMENTATION, '{data}/absent.pth', '--cfg-options',
      'data_root={data}/ADEChallengeData2016'), ['Checkpoint not found', 'absent.pth']),
    (('tools/test.py', DEMO_SEGMENTATION, 'README.md', '--cfg-options',
      'data_root={data}/ADEChallengeData2016'), ['Not a usable checkpoint', 'README.md']),
    (('tools/test.py', DEMO_DETECTION, 'README.md', '--out', 'a.json', '--cfg-options',
      'data_root={data}/coco/'), ['--out a.json', '.pkl']),
    (('tools/make_demo_data.py', '--out', 'configs'), ['not made by this tool']),
    (('tools/train.py', SEGMENTATION, '--cfg-options', 'resume'), ["KEY=VALUE, got 'resume'"]),
    (('tools/train.py', DEMO_SEGMENTATION, '--resume', 'tests/data/v1_official_classification.pt',
      '--cfg-options', 'data_root={data}/ADEChallengeData2016'), ['no state of the optimizer']),
]


@pytest.mark.parametrize(('command', 'expected'), MISTAKES)
def test_mistakes_end_in_one_message(command, expected, demo_data):
    done = run_tool(*(part.format(data=demo_data) for part in command), check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert 'Traceback' not in done.stderr
    for text in expected:
        assert text in done.stderr
    assert 'Runtime environment' not in done.stdout, 'a runner was built first'


@pytest.mark.parametrize(('option', 'message'), [
    ('model.backbone.depths=[1,1]', 'ConvNeXt: depths=[1, 1] and dims'),
    ('optim_wrapper.paramwise_cfg.decay_type=layers', "paramwise_cfg.decay_type='layers'")])
def test_settings_that_contradict_end_in_one_message(option, message, demo_data, tmp_path):
    done = run_tool('tools/train.py', DEMO_SEGMENTATION, '--work-dir', tmp_path, '--cfg-options',
                    f'data_root={demo_data}/ADEChallengeData2016', *SMALL_SEGMENTATION, option,
                    check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr.split('Error: ')[-1]
    assert 'Traceback' not in done.stderr


def test_a_checkpoint_of_the_other_task_is_refused(segmentation_run, demo_data, tmp_path):
    work_dir, _ = segmentation_run
    done = run_tool('tools/test.py', DEMO_DETECTION, work_dir / 'iter_4.pth',
                    '--work-dir', tmp_path, '--cfg-options',
                    f'data_root={demo_data}/coco/', *SMALL_DETECTION, check=False)
    assert done.returncode == 2
    assert 'does not fit the model of this config' in done.stderr
    assert 'missing neck.lateral_convs.0.conv.weight' in done.stderr
    assert 'Traceback' not in done.stderr


def test_a_mistake_under_torchrun_ends_in_one_message():
    done = run_tool('tools/dist_train.sh', SEGMENTATION, '2', check=False)
    assert done.returncode == 2
    assert done.stderr.count('Data not found') == 1
    assert 'Traceback' not in done.stderr


def test_launch_scripts_say_how_they_are_used():
    for script in ('dist_train', 'dist_test', 'slurm_train', 'slurm_test'):
        done = run_tool(f'tools/{script}.sh', check=False)
        assert done.returncode == 2
        assert 'Usage:' in done.stderr


def test_several_nodes_need_a_port():
    done = run_tool('tools/dist_train.sh', SEGMENTATION, '1', env={'NNODES': '2'}, check=False)
    assert done.returncode == 2
    assert 'PORT' in done.stderr


def test_slurm_passes_everything_on(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    import os
    done = run_tool('tools/slurm_train.sh', 'gpu', 'job', SEGMENTATION, '--amp',
                    env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': '16',
                         'GPUS_PER_NODE': '8', 'SRUN_ARGS': '--time 1:00 --mem 9G'})
    said = done.stdout.split('\n')
    for word in ('--ntasks=16', '--gres=gpu:8', '--mem', SEGMENTATION, '--amp', 'slurm'):
        assert word in said
    assert json.dumps(said).count('--launcher') == 1
