"""Runs of the tools on a few images, and their messages about mistakes.

Runs that train or evaluate have a process of their own, as when a user starts them.
"""
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from convnext_mm.engine import checks, launch
from convnext_mm.resolution import resolve
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    DETECTION,
    ROOT,
    SEGMENTATION,
    SMALL_DETECTION,
    SMALL_SEGMENTATION,
    call_tool,
    run_tool,
)

RUN_SCRIPTS = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as error:
        print('\\nExit status:', error.code)
"""


def run_scripts(*commands: list) -> subprocess.CompletedProcess:
    """Run scripts one after another in one new process, which saves imports."""
    commands = [[str(arg) for arg in command] for command in commands]
    return run_tool(sys.executable, '-c', RUN_SCRIPTS, json.dumps(commands))


def count_images(folder: Path) -> int:
    """Return the number of PNG images in a folder and its subfolders."""
    return len(list(folder.rglob('*.png')))


@pytest.fixture(scope='module')
def segmentation_options(demo_data) -> list[str]:
    """``--cfg-options`` for a small segmentor on the demo data."""
    return ['--cfg-options', f'data_root={demo_data}/ADEChallengeData2016', *SMALL_SEGMENTATION]


@pytest.fixture(scope='module')
def detection_options(demo_data) -> list[str]:
    """``--cfg-options`` for a small detector on the demo data."""
    return ['--cfg-options', f'data_root={demo_data}/coco/', *SMALL_DETECTION]


@pytest.fixture(scope='module')
def segmentation_run(segmentation_options, tmp_path_factory):
    """A small segmentation run: its work dir and its output."""
    work_dir = tmp_path_factory.mktemp('segmentation')
    done = run_tool('tools/train.py', DEMO_SEGMENTATION, '--work-dir', work_dir, '--amp',
                    *segmentation_options)
    return work_dir, done.stdout + done.stderr


@pytest.fixture(scope='module')
def detection_run(detection_options, tmp_path_factory):
    """A small detection run: its work dir and its output."""
    work_dir = tmp_path_factory.mktemp('detection')
    done = run_tool('tools/train.py', DEMO_DETECTION, '--work-dir', work_dir, '--auto-scale-lr',
                    *detection_options)
    return work_dir, done.stdout + done.stderr


def read_log(work_dir: Path) -> str:
    """mmengine's log file of a run."""
    return ''.join(path.read_text() for path in work_dir.glob('*/*.log'))


uses_segmentation_run = pytest.mark.xdist_group('segmentation_run')
uses_detection_run = pytest.mark.xdist_group('detection_run')


@pytest.mark.slow
@uses_segmentation_run
def test_segmentation_trains_and_draws_figures(segmentation_run):
    work_dir, output = segmentation_run
    assert output.count('No GPU found, running on the CPU: mixed precision → fp32, '
                        'SyncBN → BN') == 1
    assert (work_dir / 'iter_4.pth').is_file()
    assert (work_dir / 'curves.png').stat().st_size > 10_000
    assert count_images(work_dir / 'predictions') == 4
    assert 'Traceback' not in output
    assert 'stage_wise, 0.9 a layer' in output
    assert 'learning-rate decay 0.9' in read_log(work_dir)
    assert 'learning-rate decay 0.9' not in output  # the table of groups is in the file only


@pytest.mark.slow
@uses_detection_run
def test_detection_trains_and_draws_figures(detection_run):
    work_dir, output = detection_run
    assert (work_dir / 'epoch_1.pth').is_file()
    assert (work_dir / 'curves.png').stat().st_size > 10_000
    assert count_images(work_dir / 'predictions') == 4
    assert 'Traceback' not in output
    assert 'layer_wise, 0.7 a layer' in output
    assert re.search(r'LR is set based on batch size of 16 and the current batch size is 2',
                     output)


@pytest.mark.slow
@uses_segmentation_run
def test_segmentation_resumes_where_it_stopped(segmentation_run, segmentation_options):
    work_dir, _ = segmentation_run
    done = run_tool('tools/train.py', DEMO_SEGMENTATION, '--work-dir', work_dir, '--resume',
                    work_dir / 'iter_2.pth', *segmentation_options)
    output = done.stdout + done.stderr
    assert 'resumed epoch: 0, iter: 2' in output
    assert re.search(r'Iter\(train\) \[3/4\]', output)
    assert not re.search(r'Iter\(train\) \[2/4\]', output)
    longer = run_tool('tools/train.py', DEMO_SEGMENTATION, '--work-dir', work_dir, '--resume',
                      *segmentation_options, 'train_cfg.max_iters=6', check=False)
    assert longer.returncode == 2
    assert 'brings its own schedule, which ends at 4' in longer.stderr


@pytest.mark.slow
@uses_segmentation_run
def test_segmentation_is_evaluated_with_tta_and_masks(segmentation_run, segmentation_options,
                                                      tmp_path):
    work_dir, _ = segmentation_run
    done = run_tool('tools/test.py', DEMO_SEGMENTATION, work_dir / 'iter_4.pth',
                    '--work-dir', tmp_path / 'test', '--out', tmp_path / 'masks',
                    '--show-dir', tmp_path / 'shown', '--tta', *segmentation_options)
    assert 'mIoU' in done.stdout + done.stderr
    assert count_images(tmp_path / 'masks') == 4
    assert count_images(tmp_path / 'shown') == 4
    assert count_images(tmp_path / 'test' / 'predictions') == 4
    assert (tmp_path / 'test' / 'curves.png').is_file(), 'drawn from the log by the checkpoint'


@pytest.mark.slow
@uses_detection_run
def test_detection_is_evaluated_with_tta_and_pickle(detection_run, detection_options, tmp_path):
    work_dir, _ = detection_run
    commands = [['tools/test.py', DEMO_DETECTION, work_dir / 'epoch_1.pth',
                 '--work-dir', tmp_path / name, '--out', tmp_path / f'{name}.pkl',
                 '--show-dir', tmp_path / f'{name}_shown', *tta, *detection_options]
                for name, tta in (('plain', []), ('tta', ['--tta']))]
    plain, tta = run_scripts(*commands).stdout.split('--tta: evaluating boxes only')
    assert re.search(r'Epoch\(test\) .*segm_mAP', plain)
    assert re.search(r'Epoch\(test\) .*bbox_mAP', tta)
    assert not re.search(r'Epoch\(test\) .*segm_mAP', tta)
    assert 'Exit status' not in tta
    for name in ('plain', 'tta'):
        assert (tmp_path / f'{name}.pkl').is_file()
        assert count_images(tmp_path / f'{name}_shown') == 4
        assert count_images(tmp_path / name / 'predictions') == 4


@pytest.mark.slow
def test_two_processes_on_the_cpu(segmentation_options, tmp_path):
    done = run_tool('tools/dist_train.sh', DEMO_SEGMENTATION, '2', '--work-dir', tmp_path,
                    *segmentation_options)
    output = done.stdout + done.stderr
    assert output.count('nccl → gloo') == 1
    assert 'Distributed training: True' in read_log(tmp_path)
    checkpoint = torch.load(tmp_path / 'iter_4.pth', weights_only=False)
    names = list(checkpoint['state_dict'])
    assert any(name.startswith('backbone.') for name in names)
    assert not any(name.startswith('module.') for name in names)


@pytest.mark.slow
@uses_detection_run
def test_two_processes_evaluate_detection(detection_run, detection_options, tmp_path):
    work_dir, _ = detection_run
    done = run_tool('tools/dist_test.sh', DEMO_DETECTION, work_dir / 'epoch_1.pth', '2',
                    '--work-dir', tmp_path, *detection_options)
    output = done.stdout + done.stderr
    assert 'Distributed training: True' in read_log(tmp_path)
    assert re.search(r'Epoch\(test\) .*coco/segm_mAP', output)


@pytest.mark.slow
@pytest.mark.parametrize(('toolbox', 'config', 'folder', 'options', 'checkpoint', 'metric'), [
    ('mmseg', DEMO_SEGMENTATION, 'ADEChallengeData2016', SMALL_SEGMENTATION, 'iter_4.pth', 'mIoU'),
    ('mmdet', DEMO_DETECTION, 'coco/', SMALL_DETECTION, 'epoch_1.pth', 'segm_mAP')])
def test_configs_run_with_the_scripts_of_the_toolboxes(toolbox, config, folder, options,
                                                       checkpoint, metric, demo_data, tmp_path):
    cfg = Config.fromfile(config)
    data = demo_data / folder
    # On a CPU our tools make these changes themselves.
    cfg.optim_wrapper.type = 'OptimWrapper'
    del cfg.optim_wrapper.loss_scale
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(data)
    if toolbox == 'mmdet':
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            evaluator.ann_file = str(data / 'annotations/instances_val2017.json')
    cfg.dump(tmp_path / 'config.py')
    scripts = Path(importlib.util.find_spec(toolbox).submodule_search_locations[0], '.mim/tools')
    output = run_scripts(
        [scripts / 'train.py', tmp_path / 'config.py', '--work-dir', tmp_path / 'run',
         '--cfg-options', *options],
        [scripts / 'test.py', tmp_path / 'config.py', tmp_path / 'run' / checkpoint,
         '--work-dir', tmp_path / 'test', '--cfg-options', *options]).stdout
    assert count_images(tmp_path / 'run' / 'predictions') == 4
    assert count_images(tmp_path / 'test' / 'predictions') == 4
    assert re.search(rf'(Iter|Epoch)\(test\) .*{metric}', output)


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
    (('tools/train.py', DEMO_SEGMENTATION, '--work-dir', 'README.md/run'),
     ['cannot write to the folder', 'README.md/run: Not a directory']),
    (('tools/check_dataset.py', DEMO_SEGMENTATION, '--work-dir', 'README.md/run', '--cfg-options',
      'data_root={data}/ADEChallengeData2016'), ['cannot write to the folder']),
    (('tools/make_demo_data.py', '--out', 'configs'), ['not made by this tool']),
    (('tools/train.py', SEGMENTATION, '--cfg-options', 'resume'), ["KEY=VALUE, got 'resume'"]),
    (('tools/train.py', DEMO_SEGMENTATION, '--resume', 'tests/data/v1_official_classification.pt',
      '--cfg-options', 'data_root={data}/ADEChallengeData2016'), ['no optimizer state']),
]


@pytest.mark.parametrize(('command', 'expected'), MISTAKES)
def test_a_mistake_ends_with_one_message(command, expected, demo_data, monkeypatch):
    monkeypatch.setattr('mmengine.runner.Runner.__init__', unexpected_runner)
    done = call_tool(*(part.format(data=demo_data) for part in command))
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.count('rror: ') == 1, done.stderr
    for text in expected:
        assert text in done.stderr


def unexpected_runner(self, *args, **kwargs) -> None:
    raise AssertionError('a Runner was built before the mistake was found')


@pytest.mark.slow
@uses_segmentation_run
def test_mistakes_that_a_runner_finds_end_with_one_message(
        segmentation_run, segmentation_options, detection_options, tmp_path):
    """Settings that contradict each other, and a checkpoint of the other task."""
    train = ['tools/train.py', DEMO_SEGMENTATION, '--work-dir', tmp_path, *segmentation_options]
    done = run_scripts(
        [*train, 'model.backbone.depths=[1,1]'],
        [*train, 'optim_wrapper.paramwise_cfg.decay_type=layers'],
        ['tools/test.py', DEMO_DETECTION, segmentation_run[0] / 'iter_4.pth',
         '--work-dir', tmp_path, *detection_options])
    assert done.stdout.count('Exit status: 2') == 3
    assert 'Traceback' not in done.stderr
    depths, decay_type, checkpoint = done.stderr.split('\nError: ')[1:]
    assert 'ConvNeXt: depths=[1, 1] and dims' in depths
    assert "paramwise_cfg.decay_type='layers'" in decay_type
    assert 'does not fit the model of this config' in checkpoint
    assert 'missing neck.lateral_convs.0.conv.weight' in checkpoint


@pytest.mark.slow
def test_a_mistake_in_two_processes_ends_with_one_message():
    done = run_tool('tools/dist_train.sh', SEGMENTATION, '2', check=False)
    assert done.returncode == 2
    assert done.stderr.count('Data not found') == 1
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_launch_scripts_print_their_usage(script):
    done = run_tool(f'tools/{script}.sh', check=False)
    assert done.returncode == 2
    assert 'Usage:' in done.stderr


def test_several_nodes_need_a_port():
    done = run_tool('tools/dist_train.sh', SEGMENTATION, '1', env={'NNODES': '2'}, check=False)
    assert done.returncode == 2
    assert 'set PORT' in done.stderr


def test_slurm_scripts_pass_all_options_to_srun(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = run_tool('tools/slurm_train.sh', 'gpu', 'job', SEGMENTATION, '--amp',
                    env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': '16',
                         'GPUS_PER_NODE': '8', 'SRUN_ARGS': '--time 1:00 --mem 9G'})
    words = done.stdout.splitlines()
    for word in ('--ntasks=16', '--gres=gpu:8', '--mem', SEGMENTATION, '--amp', 'slurm'):
        assert word in words
    assert words.count('--launcher') == 1


@pytest.mark.parametrize('batch_job', [False, True])
def test_slurm_training_goes_on_until_it_is_done(batch_job, tmp_path):
    """A stand-in for srun stops with 75 once; in a batch job, Slurm starts the script again."""
    for name, text in (('srun', f'echo "$@" >> {tmp_path}/calls; '
                        f'test -f {tmp_path}/again || {{ touch {tmp_path}/again; exit 75; }}'),
                       ('scontrol', f'echo "$@" >> {tmp_path}/calls')):
        (tmp_path / name).write_text(f'#!/bin/sh\n{text}\n')
        (tmp_path / name).chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7' if batch_job else ''}
    run_tool('tools/slurm_train.sh', 'gpu', 'job', SEGMENTATION, env=env)
    if batch_job:
        run_tool('tools/slurm_train.sh', 'gpu', 'job', SEGMENTATION,
                 env={**env, 'SLURM_RESTART_COUNT': '1'})
    calls = (tmp_path / 'calls').read_text().splitlines()
    assert ['--resume' in call for call in calls] == [False, *[False] * batch_job, True]
    assert calls[0].count('--signal=TERM@120') == 1
    assert calls[1] == 'requeue 7' or not batch_job


def test_slurm_training_that_the_user_interrupts_is_not_started_again(tmp_path):
    """Ctrl-C reaches srun and the script: the run is saved, which ends with 75 as well."""
    srun = tmp_path / 'srun'
    srun.write_text(f'#!/bin/sh\necho call >> {tmp_path}/calls\nkill -INT $PPID\n'
                    f'test -f {tmp_path}/again && exit 0\ntouch {tmp_path}/again\nexit 75\n')
    srun.chmod(0o755)
    done = run_tool('tools/slurm_train.sh', 'gpu', 'job', SEGMENTATION, check=False,
                    env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'SLURM_JOB_ID': ''})
    assert done.returncode == 130
    assert (tmp_path / 'calls').read_text().splitlines() == ['call']


def augmented(path: Path, text: str) -> Config:
    """A detector's recipe with some lines of a user's, as ``--tta`` tests it."""
    path.write_text(f"_base_ = '{ROOT}/{DETECTION}'\n{text}")
    cfg = checks.read_config(str(path), {}, [])
    launch._use_tta(cfg)
    return cfg


def test_augmentation_of_boxes_does_not_contradict_what_validates_masks(tmp_path):
    """The Runner resolves the config again, after the mask head is gone."""
    cfg = augmented(tmp_path / 'mine.py', "val_evaluator = dict(metric=['segm'])\n"
                    "default_hooks = dict(checkpoint=dict(save_best='coco/segm_mAP_50'))\n")
    assert resolve(cfg) == [
        'train_dataloader.dataset.pipeline loads no masks: the model has no mask head']
    assert cfg.test_evaluator.metric == ['bbox']
    assert cfg.model.module.roi_head.mask_head is None


def test_augmentation_reaches_every_evaluator_of_a_list(tmp_path):
    cfg = augmented(tmp_path / 'mine.py', "test_evaluator = [dict(type='CocoMetric', metric=["
                    "'bbox', 'segm']), dict(type='DumpDetResults', out_file_path='a.pkl')]")
    assert [one.get('metric') for one in cfg.test_evaluator] == [['bbox'], None]


@pytest.mark.parametrize('kind', ['IoUMetric', 'CityscapesMetric'])
def test_class_maps_are_written_by_one_evaluator_of_a_list(tmp_path, kind):
    cfg = Config(dict(default_scope='mmseg', test_evaluator=[
        dict(type='Mine'), dict(type=kind), dict(type='IoUMetric')]))
    assert launch._dump_predictions(cfg, tmp_path) is None
    assert [one.get('output_dir') for one in cfg.test_evaluator] == [None, str(tmp_path), None]
    assert cfg.test_evaluator[1].get('keep_results', False) == (kind == 'CityscapesMetric')
