"""Package metadata, and the version ranges that tools/install.py installs."""
import shutil
from pathlib import Path

HERE = Path(__file__).parent

TORCH = 'torch>=2.6,<2.15'
BUILD = 'setuptools>=77.0.3,<90'  # license expressions
# The maintained forks and OpenMMLab's own packages share their import names: install one stack,
# not both. pip installs mmcv without its compiled operators: onedl-mmcv compiles them only if its
# build can import PyTorch, which an isolated build cannot, and mmcv-lite is mmcv without them.
FORKS = dict(
    mmcv='onedl-mmcv>=2.3.6,<2.4',
    mmengine='onedl-mmengine>=0.10.12,<0.11',
    mmseg='onedl-mmsegmentation>=1.4.2,<1.5',
    mmdet='onedl-mmdetection>=3.5.1,<3.6')
OPENMMLAB = dict(
    mmcv='mmcv-lite>=2.1,<2.2',
    mmengine='mmengine>=0.10.7,<0.11',
    mmseg='mmsegmentation>=1.2.2,<1.3',
    mmdet='mmdet>=3.3,<3.4',
    ftfy='ftfy>=6.3,<7',  # mmsegmentation imports ftfy and regex without requiring them
    regex='regex>=2024.11.6,<2027',
    setuptools='setuptools>=77.0.3,<81')  # mmengine and mmcv's build import pkg_resources
# What to build for compiled operators.
COMPILED = dict(forks=FORKS['mmcv'], openmmlab='mmcv>=2.1,<2.2')
# Exports to ONNX, and their comparison with PyTorch.
EXPORT = ['onnx>=1.23,<1.24', 'onnxscript>=0.7.2,<0.8', 'onnxruntime>=1.32,<1.33']
TIFF = 'tifffile>=2024.8.10,<2027'  # large images, and those of many bands
# Python runs it when it starts, so that mmdet's own scripts work without compiled operators.
STARTUP = Path('convnext_mm', 'ops', 'convnext_mm_operators.pth')
EXTRAS = {
    'tiff': [TIFF],
    'export': EXPORT,
    'openvino': [*EXPORT, 'openvino>=2026.4,<2026.5', 'nncf>=3.4,<3.5'],
    'web': ['gradio>=6,<7'],
    'forks': [*FORKS.values()],
    'forks-seg': [v for k, v in FORKS.items() if k != 'mmdet'],
    'openmmlab': [*OPENMMLAB.values()],
    'openmmlab-seg': [v for k, v in OPENMMLAB.items() if k != 'mmdet'],
    # transformers is the reference that the backbone is compared with.
    'test': ['pytest>=8,<10', 'pytest-xdist>=3.8,<4', 'pytest-timeout>=2.3,<3',
             'hypothesis>=6.150,<7', TIFF, *EXPORT, 'transformers>=5,<6', 'build>=1.5,<2', BUILD,
             'ruff>=0.14,<0.16', 'mypy>=2.4,<3'],
    # Runs the Triton kernels in tests without a GPU; a PyTorch for GPUs brings its own Triton.
    # The interpreter of this one converts arrays of one value to numbers, an error since numpy 2.4.
    'interpreter': ['triton>=3.6,<3.7', 'numpy<2.4'],
}

if __name__ == '__main__':
    from setuptools import find_packages, setup
    from setuptools.command.build_py import build_py

    class BuildWithRecipes(build_py):
        """Adds what lies elsewhere in a checkout.

        configs/, tools/ and model-index.yml go to .mim in the package, where mim expects them,
        docs/tables and docs/demo too, and STARTUP beside the package. An editable install links to
        the former; tools/install.py copies the latter.
        """

        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                shutil.copy(HERE / STARTUP, self.build_lib)
            target = (HERE if self.editable_mode else Path(self.build_lib)) / 'convnext_mm' / '.mim'
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for name in ('configs', 'tools', 'model-index.yml', 'docs/tables', 'docs/demo'):
                (target / name).parent.mkdir(exist_ok=True)
                if self.editable_mode:
                    (target / name).symlink_to(HERE / name)
                elif (HERE / name).is_dir():
                    shutil.copytree(HERE / name, target / name,
                                    ignore=shutil.ignore_patterns('__pycache__'))
                else:
                    shutil.copy(HERE / name, target / name)

    version = next(line.split("'")[1] for line in
                   (HERE / 'convnext_mm' / '__init__.py').read_text(encoding='utf-8').splitlines()
                   if line.startswith('__version__'))
    setup(
        name='convnext-mm',
        version=version,
        description='ConvNeXt for semantic segmentation and object detection in OpenMMLab',
        long_description=(HERE / 'README.md').read_text(encoding='utf-8'),
        long_description_content_type='text/markdown',
        author='The convnext-mm authors',
        license_expression='Apache-2.0',
        license_files=['LICENSE'],
        keywords=['ConvNeXt', 'ConvNeXt V2', 'semantic segmentation', 'object detection',
                  'instance segmentation', 'UPerNet', 'Mask R-CNN', 'Cascade Mask R-CNN',
                  'OpenMMLab', 'mmsegmentation', 'mmdetection', 'PyTorch'],
        packages=find_packages(include=['convnext_mm', 'convnext_mm.*']),
        py_modules=['convnext_mm_command'],
        package_data={'convnext_mm': ['py.typed', 'ops/*.pth']},
        entry_points={'console_scripts': ['convnext-mm = convnext_mm_command:main']},
        cmdclass={'build_py': BuildWithRecipes},
        python_requires='>=3.10',
        install_requires=[
            TORCH, 'numpy>=2.0.1,<3', 'matplotlib>=3.8.4,<4', 'pillow>=10,<14', 'pyyaml>=6,<7',
            'rich>=13,<16', 'safetensors>=0.5,<1', 'filelock>=3.12,<5'],
        extras_require=EXTRAS,
        classifiers=[
            'Development Status :: 4 - Beta',
            'Intended Audience :: Developers',
            'Intended Audience :: Science/Research',
            'Operating System :: POSIX :: Linux',
            'Programming Language :: Python :: 3',
            'Programming Language :: Python :: 3.10',
            'Programming Language :: Python :: 3.11',
            'Programming Language :: Python :: 3.12',
            'Programming Language :: Python :: 3.13',
            'Topic :: Scientific/Engineering :: Artificial Intelligence',
            'Topic :: Scientific/Engineering :: Image Recognition',
            'Typing :: Typed',
        ])
