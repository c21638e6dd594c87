"""Custom datasets: completes configs, and inspects the files."""
from .completion import (
    DATA_KEYS,
    complete_config,
    completion_enabled,
    dataset_classes,
    dataset_metainfo,
    dataset_registry,
    datasets_of_split,
    inherited_configs,
    metrics_of_split,
    replace_data_root,
    without_completion,
)

__all__ = [
    'DATA_KEYS', 'complete_config', 'completion_enabled', 'dataset_classes', 'dataset_metainfo',
    'dataset_registry', 'datasets_of_split', 'inherited_configs', 'metrics_of_split',
    'replace_data_root', 'without_completion']
