"""Custom datasets: completes configs, and inspects the files."""
from .completion import (
    DATA_KEYS,
    complete_config,
    dataset_classes,
    dataset_metainfo,
    dataset_registry,
    datasets_of_split,
    metrics_of_split,
    replace_data_root,
)

__all__ = [
    'DATA_KEYS', 'complete_config', 'dataset_classes', 'dataset_metainfo', 'dataset_registry',
    'datasets_of_split', 'metrics_of_split', 'replace_data_root']
