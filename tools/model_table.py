"""Print a table of parameters, FLOPs and memory of configs, without running the models."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('table')
