"""Draw a trained model's predictions on your own images."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('predict')
