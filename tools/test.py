"""Evaluate a segmentor or a detector."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('test')
