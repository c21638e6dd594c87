"""Recommend a recipe for a GPU memory and a latency, from the tables of docs/tables."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('choose')
