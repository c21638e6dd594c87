"""Write one page that runs exported models in a browser, without a server."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('browser-demo')
