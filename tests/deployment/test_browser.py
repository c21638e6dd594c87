"""The page that runs exported models in a browser: the same results as in Python."""
import base64
import json
import re
import runpy
import shutil
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from convnext_mm.deployment import browser
from tests.helpers import ROOT, call_tool

PAGE = ROOT / 'docs' / 'demo' / 'index.html'
NODE, NPM = shutil.which('node'), shutil.which('npm')
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
IN_PYTHON = runpy.run_path(str(ROOT / 'tools' / 'onnx_demo.py'))

ANSWERS = '''<script>
(async () => {
  const answers = [];
  for (const sample of DATA.samples) {
    await open(new Blob([bytes(sample)]), '');
    const {image, result, status} = state;
    const {classes, detections} = result ?? {};
    answers.push({size: [image?.height, image?.width], status, classes: classes && [...classes],
      detections: detections?.map(one => ({...one, mask: one.mask && [...one.mask].join('')}))});
  }
  await open(new Blob(['no image']), 'broken.png');
  answers.push(get('status').textContent);
  fetch('ADDRESS', {method: 'POST', mode: 'no-cors', body: JSON.stringify(answers)});
})();
</script>'''


def in_node(expression: str):
    """The value of an expression that uses the functions of the page."""
    script = re.search(r'<script id="pipeline">(.*?)</script>', PAGE.read_text(), re.S)[1]
    done = subprocess.run([NODE, '-'], input=f'{script}\nconsole.log(JSON.stringify({expression}))',
                          capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(not NODE, reason='node is not installed')
@pytest.mark.parametrize('target', [(52, 38), (104, 76), (33, 21), (26, 19), (100, 19), (7, 90),
                                    (1, 1)])
def test_images_are_resized_as_by_opencv(target):
    image = np.random.default_rng(0).integers(0, 256, (38, 52, 3), np.uint8)
    expected = cv2.resize(image, target, interpolation=cv2.INTER_LINEAR)
    given = dict(data=image.ravel().tolist(), width=52, height=38)
    found = in_node(f'[...resize({json.dumps(given)}, {json.dumps(target)}).data]')
    assert found == expected.ravel().tolist()


@pytest.mark.skipif(not NODE, reason='node is not installed')
@pytest.mark.parametrize('rule', [dict(scale=[160, 160], keep_ratio=True), {},
                                  dict(scale=[1333, 800], keep_ratio=True),
                                  dict(scale=[64, 32], keep_ratio=False)])
def test_the_size_is_that_of_the_test_pipeline(rule):
    for height, width in ((38, 52), (500, 333), (1, 7)):
        expected = IN_PYTHON['resize'](np.zeros((height, width, 3), np.uint8), rule).shape[1::-1]
        image = json.dumps(dict(height=height, width=width))
        assert tuple(in_node(f'targetSize({image}, {json.dumps(dict(resize=rule))})')) == expected


@pytest.mark.skipif(not NODE, reason='node is not installed')
def test_masks_are_pasted_as_by_python():
    masks = np.random.default_rng(0).random((4, 28, 28), np.float32)
    boxes = np.array([[3.2, 4.7, 20.1, 33.3], [-5.5, -2.0, 12.0, 9.0], [30, 20, 70.5, 60],
                      [10, 10, 10, 10]], np.float32)
    expected = IN_PYTHON['paste'](masks, boxes, (40, 50), 0.5)
    for mask, box, wanted in zip(masks, boxes, expected, strict=True):
        found = in_node(f'[...paste({mask.ravel().tolist()}, 28, {box.tolist()}, 50, 40, 0.5)]')
        assert np.mean(np.array(found, bool) != wanted.ravel()) < 0.001


def in_browser(page: Path, user: Path) -> list:
    """What the page, opened as a file, finds in its samples and says of a broken image."""
    received = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass
    with HTTPServer(('127.0.0.1', 0), Receiver) as server:
        server.timeout = 240
        address = f'http://127.0.0.1:{server.server_port}'
        text = page.read_text(encoding='utf-8')
        page.write_text(text.replace('</body>', ANSWERS.replace('ADDRESS', address) + '</body>'),
                        encoding='utf-8')
        process = subprocess.Popen(
            [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--no-first-run',
             '--disable-background-networking', '--lang=en', f'--user-data-dir={user}',
             '--remote-debugging-port=0', page.as_uri()],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            server.handle_request()
        finally:
            process.terminate()
            process.wait(60)
    assert received, 'the page did not answer'
    return received[0]


@pytest.fixture(scope='session')
def runtime(tmp_path_factory):
    if not (CHROMIUM and NPM):
        pytest.skip('Chromium and npm are not installed')
    return browser.fetch_runtime(tmp_path_factory.mktemp('runtime'))


@pytest.fixture
def samples(tmp_path):
    """Two images that are resized, and one that is not."""
    draw = np.random.default_rng(1)
    for i, size in enumerate(((120, 160), (90, 131), (300, 200))):
        image = cv2.resize(draw.integers(0, 256, (6, 6, 3), np.uint8), size[::-1])
        cv2.imwrite(str(tmp_path / f'{i}.png'), image)
    return sorted(tmp_path.glob('*.png'))


@pytest.mark.slow
@pytest.mark.parametrize('task', [
    pytest.param(task, marks=pytest.mark.xdist_group(f'export {task}'))
    for task in ('segmentation', 'detection')])
def test_a_browser_finds_what_python_finds(task, runtime, samples, tmp_path, request):
    model = request.getfixturevalue(task).folder / 'model.onnx'
    page = tmp_path / 'page.html'
    done = call_tool('tools/browser_demo.py', model, '--images', *samples, '--out', page,
                     '--runtime', runtime)
    assert done.returncode == 0, done.stderr
    *answers, broken = in_browser(page, tmp_path / 'user')
    assert 'broken.png is not an image' in broken
    in_python = IN_PYTHON['Model'](str(model))
    assert len(answers) == len(samples)
    for path, answer in zip(samples, answers, strict=True):
        image = cv2.imread(str(path))
        expected = in_python(image)
        assert tuple(answer['size']) == image.shape[:2]
        assert answer['status'][0] == 'done'
        if task == 'segmentation':
            assert len(set(answer['classes'])) > 1
            assert answer['classes'] == expected['classes'].ravel().tolist()
            continue
        found = answer['detections']
        assert len(found) > 3
        assert [one['label'] for one in found] == expected['labels'].tolist()
        np.testing.assert_allclose([one['score'] for one in found], expected['scores'], atol=1e-4)
        np.testing.assert_allclose([one['box'] for one in found], expected['boxes'], atol=0.01)
        for one, mask in zip(found, expected['masks'], strict=True):
            pixels = np.array([*one['mask']], int).reshape(mask.shape)
            assert np.mean(pixels != mask) < 0.001


def test_large_samples_are_made_smaller(tmp_path):
    cv2.imwrite(str(tmp_path / 'large.png'), np.zeros((1000, 3000, 3), np.uint8))
    png = base64.b64decode(browser.read_sample(tmp_path / 'large.png'))
    assert cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR).shape == (341, 1024, 3)


def test_mistakes_are_named(tmp_path):
    (tmp_path / 'model.pth').write_bytes(b'')
    (tmp_path / 'damaged.onnx').write_bytes(b'x')
    (tmp_path / 'broken.png').write_bytes(b'x')
    out = tmp_path / 'page.html'
    for args, message in [
            ([tmp_path / 'model.pth'], 'expected an ONNX file of tools/export.py'),
            ([tmp_path / 'damaged.onnx'], 'cannot be loaded'),
            ([tmp_path / 'none.onnx'], 'exported file not found')]:
        done = call_tool('tools/browser_demo.py', *args, '--out', out)
        assert done.returncode == 2
        assert message in done.stderr
    with pytest.raises(browser.UserError, match=r'broken.png: not a readable image'):
        browser.read_sample(tmp_path / 'broken.png')
    with pytest.raises(browser.UserError, match=r'ort.wasm.min.js, .* missing. Expected the folder '
                       r'dist of onnxruntime-web@'):
        browser.read_runtime(tmp_path)
    assert not out.exists()


def test_a_missing_npm_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(browser.shutil, 'which', lambda name: None)
    with pytest.raises(browser.UserError, match=r'npm, of Node.js, .* --runtime DIR'):
        browser.fetch_runtime(tmp_path)


def test_data_cannot_end_its_element():
    page = browser.fill(PAGE.read_text(encoding='utf-8'),
                        dict(models=[dict(meta=dict(classes=['</script><b>']))], samples=[]), 'ort')
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    assert json.loads(text)['models'][0]['meta']['classes'] == ['</script><b>']
