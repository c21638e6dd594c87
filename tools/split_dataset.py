"""Split images into training and validation data; near-duplicates stay on one side."""
from convnext_mm.cli import main

if __name__ == '__main__':
    main('split-data')
