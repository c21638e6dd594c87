"""Run a file of tools/export.py on images, with onnxruntime, numpy and opencv alone."""
import argparse
import glob
import json
import os
import sys

import cv2
import numpy as np
import onnxruntime


def main():
    """Draw the results on each image."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', metavar='MODEL.onnx', help='file of tools/export.py')
    parser.add_argument('images', nargs='+', metavar='IMAGE',
                        help='images, folders of images, or patterns')
    parser.add_argument('--out', default='predictions', help='output folder (predictions)')
    parser.add_argument('--score-threshold', type=float, default=0.3,
                        help='minimum score of drawn detections (0.3)')
    args = parser.parse_args()
    try:
        model = Model(args.model)
    except Exception as error:  # onnxruntime's are of many types
        sys.exit(f'{args.model}: {error}')
    os.makedirs(args.out, exist_ok=True)
    failed, paths = 0, list(find_images(args.images))
    for path, name in zip(paths, names_of(paths), strict=True):
        image = cv2.imread(path)
        if image is None:
            print(f'{path}: not a readable image', file=sys.stderr)
            failed += 1
            continue
        result = model(image)
        target = os.path.join(args.out, name)
        write(f'{target}.png', model.draw(image, result, args.score_threshold), paths)
        if 'classes' in result:
            write(f'{target}.classes.png', (result['classes'] + model.meta['first_value']).astype(
                np.uint8 if len(model.meta['classes']) < 255 else np.uint16), paths)
        else:
            rows = [dict(label=model.meta['classes'][label], score=round(float(score), 6),
                         box=[round(float(v), 3) for v in box])
                    for label, score, box in zip(result['labels'], result['scores'],
                                                 result['boxes'], strict=True)]
            with open(f'{target}.json', 'w', encoding='utf-8') as file:
                json.dump(rows, file, indent=1, ensure_ascii=False)
        print(f'{path}: {describe(result, model.meta["classes"], args.score_threshold)}')
    print(f'Results written to {args.out}')
    sys.exit(2 if failed else 0)


def names_of(paths):
    """A name for the results of each image: its own, with a number if another one has it."""
    used = set()
    for path in paths:
        name = stem = os.path.splitext(os.path.basename(path))[0]
        number = 1
        while name in used:
            number += 1
            name = f'{stem}_{number}'
        used.add(name)
        yield name


def write(path, picture, inputs):
    """Write a picture, but not in place of an input."""
    if os.path.abspath(path) in map(os.path.abspath, inputs):
        sys.exit(f'{path} is one of the images: name another folder with --out')
    if not cv2.imwrite(path, picture):
        sys.exit(f'{path} cannot be written')


def find_images(paths):
    """Files of files, folders and patterns."""
    endings = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
    for path in paths:
        if os.path.isdir(path):
            path = os.path.join(path, '*')
        found = [path] if os.path.isfile(path) else [
            file for file in sorted(glob.glob(path)) if file.lower().endswith(endings)]
        if not found:
            sys.exit(f'no image found: {path}')
        yield from found


class Model:
    """An exported model.

    Args:
        path: The ONNX file.
    """

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(path, options,
                                                    providers=['CPUExecutionProvider'])
        text = self.session.get_modelmeta().custom_metadata_map.get('convnext_mm')
        if not text:
            raise ValueError('it was not written by tools/export.py: it has no metadata')
        self.meta = json.loads(text)
        if self.meta['resize'] is None or self.meta['channels'] != 'bgr':
            raise ValueError('its config prepares images in a way that this script does not know')
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, image):
        """An image (H, W, 3) in BGR → ``classes`` (H, W), or ``boxes`` (n, 4) in its pixels,
        ``scores``, ``labels`` and ``masks`` (n, H, W)."""
        size = np.array(image.shape[:2], np.int64)
        rule = self.meta['resize']
        if self.meta['fixed']:
            rule = dict(scale=self.meta['fixed'][::-1], keep_ratio=False)
        inputs = dict(image=resize(image, rule)[None], size=size)
        if self.meta['fixed']:
            del inputs['size']
        result = {name: values[0] for name, values in zip(
            self.names, self.session.run(None, inputs), strict=True)}
        if 'scores' in result:
            count = int((result['scores'] > 0).sum())  # the outputs of a batch are filled up
            result = {name: values[:count] for name, values in result.items()}
        if self.meta['fixed']:  # the results are of that size
            if 'classes' in result:
                result['classes'] = cv2.resize(result['classes'], size[::-1].tolist(),
                                               interpolation=cv2.INTER_NEAREST)
            else:
                result['boxes'] = result['boxes'] * np.tile(size / self.meta['fixed'], 2)[
                    [1, 0, 1, 0]].astype(np.float32)
        if 'masks' in result:
            result['masks'] = paste(result['masks'], result['boxes'], size,
                                    self.meta['mask_threshold'])
        return result

    def draw(self, image, result, threshold):
        """The image with colored classes, or with boxes and masks."""
        colors = np.array(self.meta['palette'] or [], np.float32).reshape(-1, 3)[:, ::-1]
        count = len(self.meta['classes'])
        if len(colors) < count:
            hues = np.arange(count) * 67 % 180
            colors = cv2.cvtColor(np.stack([hues, hues * 0 + 200, hues * 0 + 230], -1)[None].astype(
                np.uint8), cv2.COLOR_HSV2BGR)[0].astype(np.float32)
        out = image.astype(np.float32)
        if 'classes' in result:
            known = result['classes'] < len(colors)
            out[known] = 0.4 * out[known] + 0.6 * colors[result['classes'][known]]
            return out.astype(np.uint8)
        chosen = [i for i, score in enumerate(result['scores']) if score >= threshold]
        for i in chosen if 'masks' in result else ():
            mask = result['masks'][i]
            out[mask] = 0.5 * out[mask] + 0.5 * colors[result['labels'][i]]
        out = out.astype(np.uint8)
        for i in chosen:
            label = result['labels'][i]
            color = colors[label].tolist()
            left, top, right, bottom = (round(float(v)) for v in result['boxes'][i])
            cv2.rectangle(out, (left, top), (right, bottom), color, 2)
            cv2.putText(out, f'{self.meta["classes"][label]} {result["scores"][i]:.2f}',
                        (left, max(top - 4, 10)), cv2.FONT_HERSHEY_SIMPLEX, 0.45, color, 1,
                        cv2.LINE_AA)
        return out


def resize(image, rule):
    """An image at the size that the model was tested at, as mmcv computes it."""
    if not rule:
        return image
    height, width = image.shape[:2]
    target = tuple(rule['scale'])
    if rule['keep_ratio']:
        factor = min(max(target) / max(height, width), min(target) / min(height, width))
        target = int(width * factor + 0.5), int(height * factor + 0.5)
    return cv2.resize(image, target, interpolation=cv2.INTER_LINEAR)


def paste(masks, boxes, size, threshold):
    """Masks (n, m, m) that fill their boxes (n, 4) → (n, H, W) of bool.

    Bilinear, with zeros around the mask: a product with hat functions in each direction.
    """
    height, width = (int(length) for length in size)
    out = np.zeros((len(masks), height, width), bool)
    for mask, (x0, y0, x1, y1), whole in zip(masks, boxes.astype(np.float32), out, strict=True):
        left, top = (max(int(np.floor(v)) - 1, 0) for v in (x0, y0))
        right, bottom = min(int(np.ceil(x1)) + 1, width), min(int(np.ceil(y1)) + 1, height)
        rows = hats(np.arange(top, bottom), y0, y1, mask.shape[0])
        columns = hats(np.arange(left, right), x0, x1, mask.shape[1])
        whole[top:bottom, left:right] = rows @ mask @ columns.T >= threshold
    return out


def hats(pixels, first, last, length):
    """(pixels, length): the weights of a mask's points in pixels, from the sides of its box."""
    half = np.float32(0.5)
    at = (pixels.astype(np.float32) + half - first) / max(last - first, 1e-12) * length - half
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length, dtype=np.float32)))


def describe(result, classes, threshold):
    """The largest classes of an image, or its detections."""
    if 'classes' in result:
        counts = np.bincount(result['classes'].ravel(), minlength=len(classes))
        largest = [i for i in np.argsort(-counts)[:5] if counts[i]]
        return ', '.join(f'{classes[i] if i < len(classes) else i} '
                         f'{100 * counts[i] / counts.sum():.0f} %' for i in largest)
    labels = [label for label, score in zip(result['labels'], result['scores'], strict=True)
              if score >= threshold]
    counts = np.bincount(np.array(labels, int), minlength=len(classes))
    return ', '.join(f'{counts[i]} {classes[i]}' for i in np.flatnonzero(counts)) or 'nothing'


if __name__ == '__main__':
    main()
