"""``--cfg-options KEY=VALUE``: from the command line to Python values."""
from __future__ import annotations

import argparse
import ast
from typing import Any


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    parser.add_argument('--cfg-options', nargs='+', action=KeyValueAction, metavar='KEY=VALUE',
                        help='override settings of the config, such as '
                        'train_dataloader.batch_size=4 model.backbone.drop_path_rate=0.2; '
                        'a list is key="[a,b]"')


class KeyValueAction(argparse.Action):
    """Collects KEY=VALUE pairs in a dict; reports arguments without '='."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        options = dict(getattr(namespace, self.dest, None) or {})
        for pair in values:
            key, separator, value = pair.partition('=')
            if not key or not separator:
                parser.error(f'{option_string}: expected KEY=VALUE, got {pair!r}')
            options[key] = parse_value(value)
        setattr(namespace, self.dest, options)


def parse_value(text: str) -> Any:
    """The value of an option: a Python literal, words or numbers with commas, or text as it is.

    As mmengine's DictAction, but blanks inside a value stay: ('traffic light', 'sky').
    """
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        pass
    text = text.strip()
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    kind = {'(': ')', '[': ']'}.get(text[:1])
    bracketed = kind is not None and text.endswith(kind)
    parts = _split(text[1:-1] if bracketed else text)
    if not bracketed and len(parts) == 1:
        return text
    values = [parse_value(part) for part in parts if part.strip()]
    return tuple(values) if text[:1] == '(' and bracketed else values


def _split(text: str) -> list[str]:
    """Parts between commas outside of brackets."""
    parts, depth = [''], 0
    for character in text:
        depth += (character in '([') - (character in ')]')
        if character == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += character
    return parts
