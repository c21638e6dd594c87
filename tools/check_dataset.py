"""Check all images and annotations of a config's datasets, and draw dataset.png."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('check')
