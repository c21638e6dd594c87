"""Train and evaluate segmentation, then detection, on generated images."""
from convnext_mm.demo import main

if __name__ == '__main__':
    main()
