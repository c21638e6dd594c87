"""Convert a ConvNeXt checkpoint to another library's names or file format, or publish it."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('convert')
