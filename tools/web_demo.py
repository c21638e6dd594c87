"""Serve a web page that runs a checkpoint on uploaded images."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('web-demo')
