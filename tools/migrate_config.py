"""Convert a config for mmcv 0.x or 1.x, or with mmpretrain's ConvNeXt, and report each key."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('migrate')
