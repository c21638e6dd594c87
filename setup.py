"""Package metadata, and the versions that tools/install.py sets up."""
import shutil
from pathlib import Path

HERE = Path(__file__).parent

TORCH = 'torch>=2.6,<2.14'
# The maintained forks and OpenMMLab's own packages have the same import names: install one
# stack, not both. mmdet needs mmcv's compiled ops, mmseg does not.
FORKS = dict(
    mmcv='onedl-mmcv>=2.3.6,<2.4',
    mmengine='onedl-mmengine>=0.10.12,<0.11',
    mmseg='onedl-mmsegmentation>=1.4.2,<1.5',
    mmdet='onedl-mmdetection>=3.5.1,<3.6')
OPENMMLAB = dict(
    mmcv='mmcv>=2.1,<2.2',
    mmengine='mmengine>=0.10.7,<0.11',
    mmseg='mmsegmentation>=1.2.2,<1.3',
    mmdet='mmdet>=3.3,<3.4',
    ftfy='ftfy',  # mmsegmentation imports these two without naming them
    regex='regex',
    setuptools='setuptools<81')  # mmcv's build imports pkg_resources, gone since
EXTRAS = {
    'forks': [*FORKS.values()],
    'forks-seg': [v for k, v in FORKS.items() if k != 'mmdet'],
    'openmmlab': [*OPENMMLAB.values()],
    'openmmlab-seg': [v for k, v in OPENMMLAB.items() if k != 'mmdet'],
    # transformers is what the backbone is compared with.
    'test': ['pytest>=8,<10', 'ruff>=0.14,<0.16', 'transformers>=5,<6'],
    # Tests of the kernels without a GPU; a PyTorch for GPUs brings a Triton of its own. This one's
    # interpreter makes numbers of arrays with one value, which numpy 2.4 no longer does.
    'interpreter': ['triton>=3.6,<3.7', 'numpy<2.4'],
}

if __name__ == '__main__':
    from setuptools import find_packages, setup
    from setuptools.command.build_py import build_py

    class BuildWithRecipes(build_py):
        """Puts the recipes and tools into the package, in .mim, where OpenMMLab's mim looks."""

        def run(self) -> None:
            super().run()
            target = (HERE if self.editable_mode else Path(self.build_lib)) / 'convnext_mm' / '.mim'
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for name in ('configs', 'tools', 'model-index.yml'):
                if self.editable_mode:
                    (target / name).symlink_to(HERE / name)
                elif (HERE / name).is_dir():
                    shutil.copytree(HERE / name, target / name,
                                    ignore=shutil.ignore_patterns('__pycache__'))
                else:
                    shutil.copy(HERE / name, target / name)

    version = next(line.split("'")[1] for line in
                   (HERE / 'convnext_mm' / '__init__.py').read_text().splitlines()
                   if line.startswith('__version__'))
    setup(
        name='convnext-mm',
        version=version,
        description='ConvNeXt for semantic segmentation and object detection in OpenMMLab',
        long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
        long_description_content_type='text/markdown',
        license='Apache-2.0',
        packages=find_packages(include=['convnext_mm', 'convnext_mm.*']),
        cmdclass={'build_py': BuildWithRecipes},
        python_requires='>=3.10',
        install_requires=[
            TORCH, 'numpy>=2,<3', 'matplotlib>=3.8,<4', 'pillow>=10,<14', 'rich>=13,<16',
            'safetensors>=0.5,<1', 'filelock>=3.12,<5', 'tqdm>=4.60,<5'],
        extras_require=EXTRAS,
        classifiers=[
            'License :: OSI Approved :: Apache Software License',
            'Programming Language :: Python :: 3',
            'Topic :: Scientific/Engineering :: Image Recognition',
        ])
