"""Convert annotations of Pascal VOC, YOLO, LabelMe or Roboflow to COCO format."""
import argparse

from convnext_mm.engine.datasets_cli import convert_dataset
from convnext_mm.engine.launch import run_cli

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help="folder of annotations and images, or YOLO's data.yaml")
    parser.add_argument('out', help='folder of the new files')
    parser.add_argument('--colors', metavar='CONFIG', help='instead, convert the masks in the '
                        "folder from the colors of this config's palette to class indices")
    run_cli(convert_dataset, parser.parse_args())
