"""Small models of the demo configs, exported. Tests of one of them share an xdist group."""
import ast
from pathlib import Path

import pytest
import torch

from convnext_mm.engine.checks import read_config
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, build_model, call_tool

DIMS = ['depths=[1,1,1,1]', 'dims=[8,16,24,32]']
SLIDE = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=(192,192)',
         'model.test_cfg.stride=(128,128)']  # the images are smaller


def spread(model: torch.nn.Module) -> None:
    """Let random heads give scores far from each other."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if name.endswith(('fc_cls', 'rpn_cls', 'conv_seg')):
            layer.weight.data.normal_(std=0.5, generator=generator)


class Case:
    """A small model of a demo config and its data."""

    def __init__(self, config: str, root: Path, folder: Path, options: list[str]) -> None:
        self.config, self.folder = config, folder
        self.options = ['--cfg-options', f'data_root={root}', *DIMS, *options]
        given = {'depths': [1, 1, 1, 1], 'dims': [8, 16, 24, 32], 'data_root': str(root)}
        model = build_model(config, given)
        spread(model)
        self.checkpoint = folder / 'model.pth'
        torch.save(dict(state_dict=model.state_dict()), self.checkpoint)

    def export(self, out: str, *options: str):
        """Call tools/export.py."""
        return call_tool('tools/export.py', self.config, self.checkpoint, '--out',
                         self.folder / out, *options, *self.options)

    def cfg(self):
        """The config that the tools read."""
        options = dict(option.split('=', 1) for option in self.options[1:])
        return read_config(self.config, {key: ast.literal_eval(value) if value[0] in '[(' else value
                                         for key, value in options.items()})


@pytest.fixture(scope='session')
def segmentation(demo_data, tmp_path_factory) -> Case:
    case = Case(DEMO_SEGMENTATION, demo_data / 'ADEChallengeData2016',
                tmp_path_factory.mktemp('segmentation'), SLIDE)
    case.done = case.export('model.onnx', '--pictures', str(case.folder / 'pictures'))
    return case


@pytest.fixture(scope='session')
def detection(demo_data, tmp_path_factory) -> Case:
    case = Case(DEMO_DETECTION, demo_data / 'coco', tmp_path_factory.mktemp('detection'), [])
    case.done = case.export('model.onnx')
    return case
