"""A user's own data: what a config leaves out is completed, what is wrong in the files is named."""
from .completion import (
    KEYS,
    as_written,
    classes_of,
    complete,
    completes_configs,
    evaluators,
    meta_of,
    move_data,
    of_split,
)

__all__ = ['KEYS', 'as_written', 'classes_of', 'complete', 'completes_configs',  'evaluators',
           'meta_of', 'move_data', 'of_split']
