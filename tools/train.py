"""Train a segmentor or a detector."""
from convnext_mm.cli import main

if __name__ == '__main__':
    main('train')
