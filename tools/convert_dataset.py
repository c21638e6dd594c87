"""Convert annotations of Pascal VOC, YOLO, LabelMe or Roboflow to COCO format."""
from convnext_mm_command import main

if __name__ == '__main__':
    main('convert-data')
