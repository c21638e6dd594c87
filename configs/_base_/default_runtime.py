# Settings that all recipes of both tasks share.
custom_imports = dict(imports=['convnext_mm'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook'),
    finite=dict(type='FiniteLossHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'))
custom_hooks = [
    dict(type='FitCheckpointHook'),
    dict(type='CurvesHook'),
    dict(type='PredictionsHook', num_pictures=8),
    dict(type='AbsentClassesHook'),
    dict(type='ResultsHook')
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))

runner_type = 'ConvNeXtRunner'  # completes the config for the user's data
log_level = 'INFO'
load_from = None
resume = False
# The learning rates were chosen for 8 GPUs × 2 images; --auto-scale-lr adapts them.
auto_scale_lr = dict(enable=False, base_batch_size=16)
