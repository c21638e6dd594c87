"""Metadata and configs as OpenMMLab's tools read them: mim, and the inferencers."""
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from convnext_mm.options import MEMORY
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT
from tests.recipes import RECIPES


@pytest.fixture(scope='module')
def models() -> list[dict]:
    files = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
    contents = [yaml.safe_load((ROOT / file).read_text()) for file in files]
    collections = {c['Name'] for content in contents for c in content.get('Collections', ())}
    found = [model for content in contents for model in content['Models']]
    assert {model['In Collection'] for model in found} == collections
    return found


def test_every_recipe_is_listed(models):
    recipes = {path.stem for path in (ROOT / 'configs').glob('*.py')
               if not path.stem.endswith(('_ss', '_ms'))}
    assert {model['Name'] for model in models} == recipes
    assert len(models) == len(recipes)
    for model in models:
        assert model['Config'] == f'configs/{model["Name"]}.py'
        assert model['Metadata']['Batch Size'] == 16
        results = [v for result in model.get('Results', ()) for v in result['Metrics'].values()]
        if model['Name'] in RECIPES:
            assert len(results) == (4 if model['Name'].startswith('upernet') else 2)
        else:
            assert not results, 'our recipes have not been trained'
            assert 'Weights' not in model


@pytest.mark.slow
def test_figures_match_computed_ones(models):
    """Parameters, FLOPs and estimated memory; tools/make_tables.py copies them to the docs."""
    from convnext_mm.complexity import compute_complexity, estimate_training_memory
    from convnext_mm.engine.checks import read_config
    estimated = 0
    for model in models:
        path, meta = str(ROOT / model['Config']), model['Metadata']
        result = compute_complexity(read_config(path))
        assert f'{result.parameters / 1e6:.2f}' == f'{meta["Parameters (M)"]:.2f}', path
        assert round(result.flops / 1e9) == meta['FLOPs (G)'], path
        for memory in MEMORY:
            figure = meta.get(f'Training Memory of {memory} (GB, estimated)')
            if figure is not None:
                cfg = read_config(path, {'model.backbone.memory': memory})
                assert f'{estimate_training_memory(cfg).total / 1e9:.2f}' == f'{figure:.2f}', path
                estimated += 1
        weights = read_config(path).model.backbone.init_cfg.checkpoint
        assert meta['Pretrained On'] == ('ImageNet-22K' if '_22k_' in weights else 'ImageNet-1K')
    assert estimated == 6 * len(MEMORY)


def test_weights_have_the_addresses_of_the_authors(models):
    models = [model for model in models if 'Weights' in model]
    assert {model['Name'] for model in models} == {
        name for name in RECIPES if not name.endswith(('_ss', '_ms'))}
    for model in models:
        size, weights = RECIPES[model['Name']][:2]
        if model['Name'].startswith('upernet'):
            side = 640 if '_640_' in model['Name'] else 512
            place = f'ade20k/upernet_convnext_{size}_{weights}_{side}x{side}.pth'
        else:
            kind = model['Name'].split('_convnext')[0]
            place = f'coco/{kind}_convnext_{size}_{weights}_3x.pth'
        assert model['Weights'] == f'https://dl.fbaipublicfiles.com/convnext/{place}'


def test_an_installed_package_contains_the_files_that_mim_needs(tmp_path):
    source = tmp_path / 'source'
    for name in ('convnext_mm', 'configs', 'tools', 'docs'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('.mim'))
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'model-index.yml'):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation',
                    '-w', tmp_path, source], check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob('*.whl'))).namelist()
    for name in ('model-index.yml', 'tools/train.py', 'tools/test.py', 'configs/metafile_coco.yml',
                 'configs/_base_/default_runtime.py', 'docs/tables/segmentation.json',
                 'configs/upernet_convnext_tiny_512_160k_ade20k.py'):
        assert f'convnext_mm/.mim/{name}' in names
    assert not any('__pycache__' in name for name in names)


@pytest.fixture
def photo(tmp_path) -> str:
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / 'photo.png')
    return str(tmp_path / 'photo.png')


def weights(config: str, path) -> str:
    """Save random weights of a config's model, with the backbone in mmpretrain's naming."""
    from mmengine.registry import MODELS, init_default_scope

    from convnext_mm.engine.checks import read_config
    from convnext_mm.engine.fallbacks import adapt_to_device
    cfg = read_config(config, {'model.backbone.init_cfg': None})
    init_default_scope(cfg.default_scope)
    adapt_to_device(cfg)
    torch.manual_seed(0)
    state = MODELS.build(cfg.model).state_dict()
    for ours, theirs in (('dwconv', 'depthwise_conv'), ('pwconv1', 'pointwise_conv1'),
                         ('pwconv2', 'pointwise_conv2')):
        state = {name.replace(f'.{ours}.', f'.{theirs}.'): v for name, v in state.items()}
    torch.save(dict(state_dict=state, meta={}), path)
    return str(path)


def test_inferencer_of_mmseg(photo, tmp_path):
    from mmseg.apis import MMSegInferencer

    from convnext_mm.engine.checks import read_config
    from convnext_mm.prediction import Predictor
    checkpoint = weights(DEMO_SEGMENTATION, tmp_path / 'weights.pth')
    inferencer = MMSegInferencer(DEMO_SEGMENTATION, weights=checkpoint, device='cpu')
    theirs = inferencer(photo, return_datasamples=True).pred_sem_seg.data
    ours = Predictor(read_config(DEMO_SEGMENTATION), checkpoint, 'cpu')(photo).pred_sem_seg.data
    assert theirs.shape == (1, 90, 120)
    assert torch.equal(ours, theirs)
    assert ours.max() < 8


def test_inferencer_of_mmdet(photo, tmp_path):
    from mmdet.apis import DetInferencer

    from convnext_mm.engine.checks import read_config
    from convnext_mm.engine.speed import enable_packed_inference
    from convnext_mm.prediction import Predictor
    checkpoint = weights(DEMO_DETECTION, tmp_path / 'weights.pth')
    inferencer = DetInferencer(DEMO_DETECTION, weights=checkpoint, device='cpu')
    enable_packed_inference(inferencer.model)  # as in Predictor; else sums differ in their order
    theirs = inferencer(photo, return_datasamples=True)['predictions'][0].pred_instances
    ours = Predictor(read_config(DEMO_DETECTION), checkpoint, 'cpu')(photo).pred_instances
    assert len(ours) == len(theirs) > 0
    assert torch.allclose(ours.bboxes, theirs.bboxes, atol=1e-4)
    assert torch.equal(ours.labels, theirs.labels)
