"""Check all images and annotations of a config's datasets, and draw dataset.png."""
from convnext_mm.engine.launch import check_dataset, common_parser, run_cli

if __name__ == '__main__':
    run_cli(check_dataset, common_parser(__doc__, launcher=False).parse_args())
