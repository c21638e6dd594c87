"""Remove hidden channels of a trained model's backbone."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('prune')
