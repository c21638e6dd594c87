"""Train and evaluate segmentation, then detection, on pictures drawn for the purpose."""
from convnext_mm.demo import main

if __name__ == '__main__':
    main()
