"""Before a model is built, the whole config is completed and checked as one thing.

:data:`RULES` run in order. Each is a function with a pair of settings in its name: what the user
changes in the first reaches the second, or is refused. To add a rule, add a function.
"""
from __future__ import annotations

from collections.abc import Callable

from mmengine.config import Config

from . import batches, data, mmpretrain, model, runtime, schedule, signatures, top_level
from .edits import Edits, history_of

RULES: tuple[Callable[[Edits], None], ...] = (
    runtime.model_in_dtype_and_base,
    mmpretrain.mmpretrain_and_backbone,
    top_level.misspelt_keys,
    top_level.short_names_and_settings,
    runtime.counts_and_whole_numbers,
    signatures.type_and_inherited_keys,
    runtime.pretrained_and_init_cfg,
    top_level.scale_and_pipelines,
    top_level.crop_size_and_pipeline,
    batches.size_and_size_divisor,
    batches.images_and_padding,
    batches.window_and_stride,
    data.in_chans_and_pipelines,
    data.imdecode_backend_and_packages,
    data.dataset_type_and_reduce_zero_label,
    data.data_format_and_conversion,
    data.classes_and_palette,
    data.data_root_and_classes,
    data.val_and_dataloaders,
    data.classes_and_reduce_zero_label,
    data.data_and_heads,
    data.ignore_and_datasets,
    data.ignore_index_and_masks,
    data.dataset_type_and_labels,
    data.test_data_and_annotations,
    data.classes_and_background,
    model.in_chans_and_data_preprocessor,
    model.arch_and_layer_scale,
    model.head_type_and_in_channels,
    model.out_indices_and_in_index,
    model.backbone_and_in_channels,
    model.backbone_maps_and_neck,
    model.backbone_strides_and_anchors,
    model.neck_and_in_channels,
    model.backbone_maps_and_heads,
    model.heads_and_neck_layout,
    model.num_classes_and_out_channels,
    model.classes_and_num_things_classes,
    model.num_classes_and_losses,
    model.loss_bbox_and_reg_decoded_bbox,
    model.masks_and_mask_head,
    model.mask_head_and_metric,
    runtime.test_pipeline_and_tta_pipeline,
    data.datasets_and_tta_pipeline,
    model.batch_size_and_norm,
    model.test_cfg_and_mode,
    runtime.dataloader_and_evaluator,
    runtime.evaluator_and_metrics,
    runtime.evaluator_and_save_best,
    runtime.custom_hooks_and_recipe_hooks,
    top_level.log_to_and_vis_backends,
    runtime.vis_backends_and_local_log,
    runtime.vis_backends_and_packages,
    runtime.num_workers_and_persistent_workers,
    runtime.randomness_and_seed,
    top_level.early_stopping_and_hooks,
    schedule.train_loop_and_sampler,
    schedule.train_cfg_and_param_scheduler,
    schedule.train_loop_and_hooks,
    schedule.train_loop_and_by_epoch,
    schedule.train_cfg_and_warm_up,
    schedule.train_cfg_and_end_of_schedule,
    schedule.param_scheduler_and_layer_decay,
    signatures.dataloaders_and_signature,
    signatures.types_and_registries,
    signatures.keys_and_signatures,
    runtime.inference_dtype_and_model,
)


def resolve(cfg: Config) -> list[str]:
    """Complete and check a config, in place; a resolved config stays as it is.

    Args:
        cfg: As read from its file, with the options of the command line.

    Returns:
        What followed from the user's changes, a line each.

    Raises:
        UserError: What was set, what it contradicts, and what to write instead.
    """
    if cfg.get('default_scope') not in ('mmseg', 'mmdet'):
        return []
    edits = Edits(cfg, history_of(cfg))
    for rule in RULES:
        rule(edits)
    return edits.notes
