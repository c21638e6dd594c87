"""Fits weights to the model when mmengine loads a checkpoint."""
from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log

from ..utils import unwrap_model
from .loading import describe_parts, fit_model_weights, require_complete


class FitCheckpointHook(Hook):
    """Fits the weights of ``load_from`` and ``resume`` to the model before mmengine loads them.

    mmengine loads parameters whose name and shape match and ignores the others: with another naming
    it would load nothing, and training would start from random weights.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which copies the weights

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace the weights under 'state_dict'.

        Raises:
            UserError: They do not fit the backbone or, when resuming, the whole model.
        """
        model = unwrap_model(runner.model)
        source = str(runner._load_from or f'The latest checkpoint in {runner.work_dir}')
        state, line = fit_model_weights(checkpoint, model, source)
        if runner._resume:
            require_complete(model, state, source)
        else:
            if line:
                print_log(line, logger='current')
            own = model.state_dict()
            print_log('\n  '.join([f'Weights of {source}:', *describe_parts(own, state)]),
                      logger='current')
            state = {name: value for name, value in state.items()
                     if name in own and value.shape == own[name].shape}
        checkpoint['state_dict'] = state
