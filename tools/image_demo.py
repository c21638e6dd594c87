"""Draw a trained model's predictions on your own images."""
from convnext_mm.cli import main

if __name__ == '__main__':
    main('predict')
