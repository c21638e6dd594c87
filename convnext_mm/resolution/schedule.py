"""The length of a run, and the schedule that follows it."""
from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..utils import plain
from .data import default_argument
from .edits import Edits, lookup, same
from .signatures import find_class

LENGTHS = ('begin', 'end', 'milestones', 'step_size', 'T_max', 'total_iters', 'total_steps')
"""Settings of mmengine's schedulers that count iterations or epochs."""


def run_length(train_cfg: dict[str, Any] | None) -> tuple[int, bool] | None:
    """How long a run is, and whether that counts epochs; None: it does not say."""
    train_cfg = train_cfg or {}
    # A file's own type stands beside the length of the recipe's until that is dropped.
    first = 'Epoch' in str(train_cfg.get('type'))
    for by_epoch in (first, not first):
        value = train_cfg.get('max_epochs' if by_epoch else 'max_iters')
        if isinstance(value, int):
            return value, by_epoch
    return None


def train_cfg_and_param_scheduler(edits: Edits) -> None:
    """A schedule that was made for a run of another length gets the length of this one.

    Warm-up, milestones, validation and checkpoints keep their share of the run. A schedule is made
    for the length of the config that sets it: the recipe, a file of the user's, or the options.

    Raises:
        UserError: The run counts epochs and the schedule was made for iterations, or the reverse.
    """
    new = run_length(edits.get('train_cfg'))
    if new is None:
        return
    unit = _unit(new)
    followed: list[str] = []
    before = ''
    for path in ('param_scheduler', 'train_cfg.val_interval', 'default_hooks.checkpoint.interval'):
        value = edits.get(path)
        by_short_name = not same(value, lookup(edits.history[0], path))
        state = edits.set_in(path.rpartition('.')[2] if by_short_name else path)
        old = _length_in(edits, edits.history[state])
        if not value or old is None or old == new:
            continue
        if old[1] != new[1] and path == 'param_scheduler':
            raise UserError(
                f'train_cfg trains for {new[0]} {unit}, but param_scheduler was made for {old[0]} '
                f'{_unit(old)}: set train_cfg.'
                f'{"max_epochs" if old[1] else "max_iters"}, or your own param_scheduler')
        share = new[0] / old[0]
        before = f'{old[0]}' if old[1] == new[1] else f'{old[0]} {_unit(old)}'
        if path == 'param_scheduler':
            schedule = plain(value if isinstance(value, (list, tuple)) else [value])
            edits.cfg.param_scheduler = [scaled(one, share, new) for one in schedule]
            followed.append(path)
        elif isinstance(value, int) and value > 0 and max(1, round(value * share)) != value:
            edits.put(path, max(1, round(value * share)))
            followed.append(f'{path}={edits.get(path)}')
    if followed:
        edits.note(f'{new[0]} {unit} instead of {before}, scaled with it: {", ".join(followed)}')


def _unit(length: tuple[int, bool]) -> str:
    return 'epochs' if length[1] else 'iterations'


def _length_in(edits: Edits, state: dict[str, Any]) -> tuple[int, bool] | None:
    """The length of the run in a state, where a short name may not have reached it yet."""
    length = run_length(state.get('train_cfg'))
    if length is None:
        return None
    short = state.get('max_epochs' if length[1] else 'max_iters')
    followed = isinstance(short, int) and length == run_length(edits.recipe.get('train_cfg'))
    return (short, length[1]) if followed and short is not None else length


def scaled(scheduler: dict[str, Any], share: float, length: tuple[int, bool]) -> dict[str, Any]:
    """A scheduler for a run of another length, whose milestones lie inside the run.

    mmengine's schedulers by iteration arrive one iteration before their end, which is why the
    recipes' ends are one more than a round number: that one stays.
    """
    def scale(value: int) -> int:
        extra = int(not scheduler.get('by_epoch', True) and value % 10 == 1)
        return max(1, round((value - extra) * share)) + extra if value > 0 else value
    result = dict(scheduler)
    for key in LENGTHS:
        value = scheduler.get(key)
        if isinstance(value, list):
            last = length[0] - 1 if scheduler.get('by_epoch', True) == length[1] else None
            result[key] = sorted({m if last is None else min(m, last) for m in map(scale, value)
                                  if last is None or last > 0})
        elif isinstance(value, int) and not isinstance(value, bool):
            result[key] = scale(value)
    if scheduler['type'] == 'LinearLR' and 'end' in result:
        result['end'] = max(result['end'], result.get('begin', 0) + 2)  # one step at the least
    return result


def train_cfg_and_warm_up(edits: Edits) -> None:
    """A run is longer than its warm-up, and its schedule reaches its end.

    Raises:
        UserError: The warm-up alone would take the whole run, or the schedule of the learning rate
            is made for a run of another length.
    """
    length = run_length(edits.get('train_cfg'))
    schedule = _schedulers(edits)
    if length is None:
        return
    for one in schedule:
        by_epoch = one.get('by_epoch', True)
        end = one.get('end')
        if by_epoch != length[1] or not isinstance(end, int):
            continue
        if one['type'] in ('LinearLR', 'ConstantLR') and one.get('begin', 0) == 0 and (
                end > length[0] + 1 and len(schedule) > 1):
            raise UserError(
                f'param_scheduler warms up until {end}, but the run ends at {length[0]} '
                f'(train_cfg): set end={max(1, length[0] // 10)} of {one["type"]}, or train longer')
        if one['type'] in ('PolyLR', 'CosineAnnealingLR', 'LinearLR') and (
                end > 1.05 * length[0] + 1):
            raise UserError(
                f'param_scheduler: {one["type"]} ends at {end}, but the run at {length[0]} '
                f'(train_cfg), with a learning rate that has hardly decayed: set end={length[0]}')
        milestones = [m for m in one.get('milestones') or () if m >= length[0]]
        if milestones and len(milestones) == len(one['milestones']):
            raise UserError(
                f'param_scheduler: {one["type"]} has milestones={list(one["milestones"])}, but the '
                f'run ends at {length[0]} (train_cfg) before the first: set milestones below it')


def train_loop_and_hooks(edits: Edits) -> None:
    """Hooks count what the loop counts: in another unit, a checkpoint would come at the end only.
    """
    new, old = (run_length(one) for one in (edits.get('train_cfg'), edits.inherited('train_cfg')))
    if new is None or old is None or new[1] == old[1]:
        return
    for place, key in (('default_hooks.checkpoint', 'by_epoch'), ('log_processor', 'by_epoch'),
                       ('default_hooks.logger', 'log_metric_by_epoch')):
        path = f'{place}.{key}'
        if edits.get(place) and edits.get(path, True) != new[1] and (
                edits.set_in(path) == len(edits.history) - 1):
            edits.put(path, new[1])
            edits.note(f'={new[1]}: train_cfg counts {_unit(new)}', path)


def train_loop_and_by_epoch(edits: Edits) -> None:
    """A schedule in a run of iterations counts iterations: no epoch ends before the run does.

    Raises:
        UserError: It counts epochs, as mmengine's do by default.
    """
    length = run_length(edits.get('train_cfg'))
    if length is None or length[1]:
        return
    for one in _schedulers(edits):
        kind = find_class(edits.get('default_scope'), 'PARAM_SCHEDULERS', one['type'])
        if one.get('by_epoch', default_argument(kind, 'by_epoch')) is not True or one.get(
                'convert_to_iter_based') or 'Plateau' in str(one['type']) or (
                one['type'] == 'ConstantLR' and one.get('factor') == 1):
            continue
        raise UserError(
            f'param_scheduler: {one["type"]} counts epochs, but train_cfg trains for {length[0]} '
            'iterations, in which none ends: the learning rate would stay as it is. Write '
            f'by_epoch=False, and its {", ".join(key for key in LENGTHS if key in one) or "end"} '
            'in iterations')


def train_cfg_and_end_of_schedule(edits: Edits) -> None:
    """A schedule that ends at a rate of nearly 0 ends when the run does.

    Raises:
        UserError: It ends before 95% of the run.
    """
    length = run_length(edits.get('train_cfg'))
    if length is None:
        return
    last = max((one for one in _schedulers(edits) if str(one['type']).endswith('LR')
                and one.get('by_epoch', True) == length[1]), key=_end, default=None)
    if last is None or _end(last) >= 0.95 * length[0]:
        return
    rate = edits.get('optim_wrapper.optimizer.lr') or 1.0
    left = dict(OneCycleLR=0.0, LinearLR=last.get('end_factor', 1.0), **dict.fromkeys(
        ('PolyLR', 'CosineAnnealingLR'),
        last.get('eta_min_ratio') or (last.get('eta_min') or 0.0) / rate)).get(last['type'], 1.0)
    if left < 0.01:
        raise UserError(
            f'param_scheduler: {last["type"]} ends at {_end(last)}, but the run at {length[0]} '
            f'{_unit(length)} (train_cfg), and between them the learning rate would stay at '
            f'{left * rate:g}: set end={length[0]}, or train for {_end(last)} {_unit(length)}')


def _schedulers(edits: Edits) -> list[dict[str, Any]]:
    schedule = edits.get('param_scheduler') or ()
    listed = schedule if isinstance(schedule, (list, tuple)) else [schedule]
    return [one for one in listed if one.get('type')]  # not the lists of several optimizers


def _end(scheduler: dict[str, Any]) -> int:
    """Where a scheduler ends, in its own unit."""
    return scheduler.get('total_steps') or scheduler.get('end') or 10**9


def train_loop_and_sampler(edits: Edits) -> None:
    """A loop of epochs has a sampler that ends.

    Raises:
        UserError: It has an InfiniteSampler, with which an epoch never ends.
    """
    length = run_length(edits.get('train_cfg'))
    sampler = edits.get('train_dataloader.sampler') or {}
    if length and length[1] and sampler.get('type') == 'InfiniteSampler':
        raise UserError(
            'train_cfg counts epochs, but train_dataloader.sampler is an InfiniteSampler, with '
            "which an epoch never ends: set train_dataloader.sampler=dict(type='DefaultSampler', "
            'shuffle=True)')


def param_scheduler_and_layer_decay(edits: Edits) -> None:
    """A scheduler keeps the ratio between the layers' learning rates.

    A cosine with ``eta_min`` in a config that was written for mmpretrain, such as mmdet's RTMDet,
    gets the same ratio to the learning rate in every layer.

    Raises:
        UserError: It gives all groups one absolute rate, which undoes layer-wise decay.
    """
    constructor = edits.get('optim_wrapper.constructor')
    if constructor != 'LearningRateDecayOptimizerConstructor':
        return
    for one in _schedulers(edits):
        for key, instead in (('eta_max', 'total_steps and a LinearLR warm-up with PolyLR'),
                             ('eta_min', 'eta_min_ratio')):
            value = one.get(key)
            per_group = isinstance(value, (list, tuple))
            if value and not per_group and not (key == 'eta_min' and 'eta_max' in one):
                lr = edits.get('optim_wrapper.optimizer.lr')
                if key == 'eta_min' and one['type'].startswith('Cosine') and lr and (
                        edits.for_mmpretrain):
                    one['eta_min_ratio'] = one.pop('eta_min') / lr
                    edits.note(f'param_scheduler: {one["type"]} has eta_min_ratio='
                               f'{one["eta_min_ratio"]:g} instead of eta_min={value}, which would '
                               'undo the layer-wise decay')
                    continue
                raise UserError(
                    f'param_scheduler: {one["type"]} has {key}={value}, one rate for all parameter '
                    'groups, which undoes the layer-wise decay of optim_wrapper.paramwise_cfg: '
                    f'use {instead} instead')
