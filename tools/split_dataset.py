"""Split images into training and validation data; near-duplicates stay on one side."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('split-data')
