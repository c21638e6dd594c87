"""From a checkpoint to an exported file that was compared, and what uses it."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest

from convnext_mm.deployment import export, runtimes
from convnext_mm.deployment.images import ImageSource
from convnext_mm.deployment.quantizing import layers_by_noise, quantize_onnx
from convnext_mm.errors import UserError
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT, call_tool


@pytest.mark.slow
@pytest.mark.xdist_group('export segmentation')
def test_segmentation_to_onnx(segmentation):
    done, folder = segmentation.done, segmentation.folder
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / 'model.onnx.json').read_text())
    assert {case['case'] for case in report['cases']} == {
        'test images', 'another size', 'a batch of two', 'one side smaller than the crop',
        'both sides smaller than the crop'}
    assert all(case['pixels'] > 1000 for case in report['cases'])
    assert report['metrics']['PyTorch']['mIoU'] == pytest.approx(
        report['metrics']['ONNX Runtime']['mIoU'], abs=0.1)
    assert 'mIoU' in (folder / 'model.onnx.md').read_text()
    assert len(list((folder / 'pictures').glob('*.png'))) == 4


@pytest.mark.slow
@pytest.mark.xdist_group('export segmentation')
def test_the_file_is_plain_and_says_nothing_of_this_machine(segmentation):
    path = segmentation.folder / 'model.onnx'
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} == {''}
    content = path.read_bytes()
    assert b'convnext_mm' in content
    for secret in (str(ROOT), sys.prefix, str(segmentation.folder), 'site-packages', '.py'):
        assert secret.encode() not in content
    assert [d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim][:3] == [
        'batch', 'height', 'width']
    meta = runtimes.load_exported(path).meta
    assert meta['task'] == 'segmentation'
    assert meta['classes'][0] == 'sand'
    assert meta['resize'] == dict(scale=[160, 160], keep_ratio=True)


@pytest.mark.slow
@pytest.mark.xdist_group('export segmentation')
def test_a_file_that_differs_is_deleted(segmentation, monkeypatch):
    load = runtimes.LOADERS['.onnx']

    def load_and_change(path):
        exported = load(path)

        def run(image, size):
            classes = exported.run(image, size)['classes'].copy()
            if len(image) == 2:  # only a batch is wrong
                classes[1] = classes[0]
            return dict(classes=classes)
        return exported._replace(run=run)
    monkeypatch.setitem(runtimes.LOADERS, '.onnx', load_and_change)
    folder = segmentation.folder
    done = segmentation.export('wrong.onnx')
    assert done.returncode == 2
    assert 'not equal to PyTorch and was deleted: a batch of two' in done.stderr
    assert not (folder / 'wrong.onnx').exists()
    assert 'Not kept' in (folder / 'wrong.onnx.md').read_text()
    (folder / 'wrong.onnx').write_bytes(b'an older export')
    (folder / 'wrong.onnx.md').write_text('of the older one')
    done = segmentation.export('wrong.onnx')
    assert done.returncode == 2
    assert 'the older' in done.stderr
    assert (folder / 'wrong.onnx').read_bytes() == b'an older export'
    assert (folder / 'wrong.onnx.md').read_text() == 'of the older one'
    assert 'Not kept' in (folder / 'wrong.onnx.refused.md').read_text()
    assert not list(folder.glob('.export_*'))


@pytest.mark.slow
@pytest.mark.xdist_group('export segmentation')
@pytest.mark.parametrize('error', [UserError('an image is damaged'), KeyboardInterrupt()])
def test_nothing_is_left_of_an_export_that_stops(segmentation, monkeypatch, error):
    """While images are compared: an error that is not the runtime's, and Ctrl-C."""
    def stop(*args):
        raise error
    monkeypatch.setattr(export, 'draw_pair', stop)
    before = set(segmentation.folder.iterdir())
    done = segmentation.export('stopped.onnx', '--pictures',
                               str(segmentation.folder / 'pictures'))
    assert done.returncode in (2, 130)
    assert set(segmentation.folder.iterdir()) == before


@pytest.mark.slow
@pytest.mark.xdist_group('export segmentation')
def test_a_runtime_that_fails_is_named(segmentation, monkeypatch):
    load = runtimes.LOADERS['.onnx']

    def fail(image, size):
        raise RuntimeError('no memory for a tensor')
    monkeypatch.setitem(runtimes.LOADERS, '.onnx', lambda path: load(path)._replace(run=fail))
    done = segmentation.export('failed.onnx')
    assert done.returncode == 2
    assert 'deleted: ONNX Runtime fails: no memory for a tensor' in done.stderr
    assert not (segmentation.folder / 'failed.onnx').exists()


def test_other_files_are_not_overwritten(tmp_path):
    weights = tmp_path / 'model.bin'
    weights.write_bytes(b'weights')
    with pytest.raises(UserError, match='model.bin would be overwritten'):
        export.check_not_overwritten(tmp_path / 'model.xml', 'other.pth')
    (tmp_path / 'model.xml').write_text('an older export')
    export.check_not_overwritten(tmp_path / 'model.xml', 'other.pth')
    with pytest.raises(UserError, match='model.bin would be overwritten'):
        export.check_not_overwritten(tmp_path / 'model.xml', str(weights))
    export.check_not_overwritten(tmp_path / 'model.onnx', str(weights))


@pytest.mark.parametrize(('options', 'message'), [
    (('--images', '0'), "expected a whole number from 1, not '0'"),
    (('--calibration', '-1'), "expected a whole number from 1, not '-1'"),
    (('--size', '512'), "expected width and height in pixels, such as 1280x800, not '512'"),
    (('--size', '0x512'), "expected width and height in pixels, such as 1280x800, not '0x512'"),
    (('--int8', '--max-drop', 'nan'), '--max-drop nan: expected percent'),
    (('--int8', '--max-drop', '-1'), '--max-drop -1.0: expected percent'),
    (('--to', 'torch-export', '--out', 'm.aoti.pt2'), 'm.aoti.pt2, which is of --to aoti: expected '
                                                      'a name that ends in .pt2')])
def test_numbers_and_names_are_checked_first(options, message):
    done = call_tool('tools/export.py', DEMO_SEGMENTATION, 'none.pth', *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_how_images_are_read_is_in_the_metadata():
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(4, 2), keep_ratio=True),
             dict(type='PackSegInputs')]
    assert export.resize_rule(steps) == dict(scale=[4, 2], keep_ratio=True)
    assert export.resize_rule([steps[0], steps[2]]) == {}
    for other in dict(color_type='grayscale'), dict(to_float32=True):
        assert export.resize_rule([{**steps[0], **other}, *steps[1:]]) is None


@pytest.mark.slow
@pytest.mark.xdist_group('export segmentation')
def test_an_exported_file_is_tested(segmentation):
    path, options = segmentation.folder / 'model.onnx', segmentation.options
    report = json.loads((segmentation.folder / 'model.onnx.json').read_text())
    done = call_tool('tools/test.py', DEMO_SEGMENTATION, path, *options)
    assert done.returncode == 0, done.stderr
    assert f"mIoU: {report['metrics']['PyTorch']['mIoU']:.2f}" in done.stdout
    done = call_tool('tools/test.py', DEMO_SEGMENTATION, path, '--tta', *options)
    assert done.returncode == 2
    assert '--tta is for checkpoints' in done.stderr
    done = call_tool('tools/test.py', DEMO_DETECTION, path, '--cfg-options',
                     f'data_root={Path(options[1].split("=")[1]).parent / "coco"}')
    assert done.returncode == 2
    assert 'is of segmentation, but the config is of detection' in done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group('export segmentation')
def test_int8(segmentation):
    done = segmentation.export('int8.onnx', '--int8', '--max-drop', '100', '--calibration', '3')
    assert done.returncode == 0, done.stderr
    assert 'int8 with 0 layers in fp32: within the limit' in done.stdout
    plain, small = (onnx.load(segmentation.folder / name) for name in ('model.onnx', 'int8.onnx'))
    assert small.ByteSize() < 0.6 * plain.ByteSize()
    convs = [node for node in small.graph.node if node.op_type == 'Conv']
    assert len(convs) == sum(node.op_type == 'Conv' for node in plain.graph.node)
    scaled = {node.output[0] for node in small.graph.node if node.op_type == 'DequantizeLinear'}
    assert all(scaled.issuperset(node.input[:2]) for node in convs)
    report = json.loads((segmentation.folder / 'int8.onnx.json').read_text())
    assert set(report['latency']['times']) == {'PyTorch', 'ONNX Runtime', 'ONNX Runtime, fp32'}


@pytest.mark.slow
@pytest.mark.xdist_group('export detection')
def test_detection_to_onnx(detection):
    done = detection.done
    assert done.returncode == 0, done.stderr
    report = json.loads((detection.folder / 'model.onnx.json').read_text())
    assert report['cases'][0]['detections'] > 20
    assert all(case['unmatched'] == 0 for case in report['cases'])
    model = onnx.load(detection.folder / 'model.onnx')
    assert {'RoiAlign', 'NonMaxSuppression'} <= {node.op_type for node in model.graph.node}
    assert not any(node.domain for node in model.graph.node)


@pytest.mark.slow
@pytest.mark.parametrize('task', [
    pytest.param('segmentation', marks=pytest.mark.xdist_group('export segmentation')),
    pytest.param('detection', marks=pytest.mark.xdist_group('export detection'))])
def test_the_demo_without_pytorch_gives_the_same(task, request, tmp_path):
    case = request.getfixturevalue(task)
    script = ROOT / 'tools' / 'onnx_demo.py'
    model = runpy.run_path(str(script))['Model'](str(case.folder / 'model.onnx'))
    cfg = case.cfg()
    exported = runtimes.load_exported(case.folder / 'model.onnx')
    for image in ImageSource(cfg, 'test', None):
        sample = runtimes.to_sample(exported.run(image.pixels[None], image.size), 0,
                                    image.sample, 0.5)
        result = model(cv2.imread(image.sample.img_path))
        if task == 'segmentation':
            assert (result['classes'] == sample.pred_sem_seg.data[0].numpy()).all()
        else:
            found = sample.pred_instances
            assert np.abs(result['boxes'] - found.bboxes.numpy()).max() < 1e-3
            assert (result['masks'] == found.masks.numpy()).mean() > 0.9999
    # In a process that refuses to import anything of PyTorch.
    code = ("import sys, runpy; sys.modules.update(torch=None, mmcv=None, mmengine=None, "
            f"convnext_mm=None); sys.argv = ['onnx_demo.py', {str(case.folder / 'model.onnx')!r}, "
            f"{image.sample.img_path!r}, '--out', {str(tmp_path)!r}]; "
            f"runpy.run_path({str(script)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [
        '.png' if task == 'segmentation' else '.json', '.png']


def test_the_demo_without_pytorch_overwrites_nothing(tmp_path):
    script = runpy.run_path(str(ROOT / 'tools' / 'onnx_demo.py'))
    paths = ['a/x.jpg', 'b/x.png', 'x_2.png', 'b/y.png']
    assert list(script['names_of'](paths)) == ['x', 'x_2', 'x_2_2', 'y']
    picture = tmp_path / 'x.png'
    with pytest.raises(SystemExit, match='x.png is one of the images'):
        script['write'](str(picture), np.zeros((2, 2, 3), np.uint8), [str(picture)])
    with pytest.raises(SystemExit, match='cannot be written'):
        script['write'](str(tmp_path / 'none' / 'x.png'), np.zeros((2, 2, 3), np.uint8), [])
    assert not picture.exists()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    from convnext_mm.deployment import optional
    monkeypatch.setattr(optional, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"^onnx and onnxscript must be installed for this: pip "
                                        r"install 'convnext-mm\[export\]'$"):
        optional.require('onnx', 'onnxscript')


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(UserError, match='exported file not found'):
        runtimes.load_exported(tmp_path / 'none.onnx')
    (tmp_path / 'text.onnx').write_text('no model')
    with pytest.raises(UserError, match=r'text.onnx cannot be loaded'):
        runtimes.load_exported(tmp_path / 'text.onnx')
    helper = onnx.helper
    value = helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node('Identity', ['x'], ['y'])], 'g', [value], [
        helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10),
              tmp_path / 'other.onnx')
    with pytest.raises(UserError, match='was not written by tools/export.py'):
        runtimes.load_exported(tmp_path / 'other.onnx')


def two_layers() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Two 1x1 convolutions, of which the second has weights of two magnitudes; and an input."""
    rng = np.random.default_rng(0)
    weights = {'even': rng.normal(size=(4, 3, 1, 1)), 'outlier': rng.normal(size=(4, 4, 1, 1))}
    weights['outlier'][:, 0] *= 1000
    helper = onnx.helper
    nodes = [helper.make_node('Conv', ['x', 'even'], ['y'], name='first'),
             helper.make_node('Conv', ['y', 'outlier'], ['z'], name='second')]
    graph = helper.make_graph(
        nodes, 'g', [helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info('z', onnx.TensorProto.FLOAT, [1, 4, 8, 8])],
        [onnx.numpy_helper.from_array(value.astype(np.float32), key)
         for key, value in weights.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
    return model, dict(x=rng.normal(size=(1, 3, 8, 8)).astype(np.float32))


def test_ranges_are_those_of_all_images_and_measured_once(tmp_path):
    model, feed = two_layers()
    plain = tmp_path / 'plain.onnx'
    onnx.save(model, plain)
    feeds = [feed, dict(x=3 * feed['x'])]
    ranges = quantize_onnx(plain, tmp_path / 'int8.onnx', dict(version=''), feeds)
    session = onnxruntime.InferenceSession(plain)
    outputs = np.stack([session.run(None, one)[0] for one in feeds])
    for name, value in dict(x=feeds[1]['x'], z=outputs).items():
        low, high = ranges[name].range_value
        assert float(low) == pytest.approx(value.min(), rel=1e-5)
        assert float(high) == pytest.approx(value.max(), rel=1e-5)
    quantize_onnx(plain, tmp_path / 'second.onnx', dict(version=''), [], ['first'], ranges)
    layers = {name: [node.op_type for node in onnx.load(tmp_path / name).graph.node]
              for name in ('int8.onnx', 'second.onnx')}
    assert layers['int8.onnx'].count('QuantizeLinear') > layers['second.onnx'].count(
        'QuantizeLinear') > 0


def test_layers_with_outliers_come_first():
    model, feed = two_layers()
    assert layers_by_noise(model, [feed]) == ['second', 'first']
    feed['x'][0, 0] *= 1e5
    assert layers_by_noise(model, [feed])[0] == 'first'


def test_wrong_options(demo_data):
    done = call_tool('tools/export.py', DEMO_SEGMENTATION, 'none.pth', '--to', 'aoti', '--int8',
                     '--cfg-options', f'data_root={demo_data / "ADEChallengeData2016"}')
    assert done.returncode == 2
    assert '--int8 is not available with --to aoti' in done.stderr
    done = call_tool('tools/export.py', DEMO_SEGMENTATION, 'none.pth', '--to', 'coreml')
    assert done.returncode == 2
    assert 'Core ML files run on macOS only' in done.stderr
