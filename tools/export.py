"""Export a model for another runtime, and compare it with PyTorch on the test images."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('export')
