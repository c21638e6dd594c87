"""Which channels of a layer's input to keep, and how those stand in for the others."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-6
"""Of the mean variance, added to each channel's, so that equal channels can be solved for."""


@dataclass
class Statistics:
    """Of channels, over all pixels.

    Args:
        count: Pixels.
        total: (channels,): the sum.
        products: (channels, channels): the sums of products.
        output: The sum of squares of a block's output, for comparison between blocks.
    """

    count: int
    total: Tensor
    products: Tensor
    output: float = 0.0

    @classmethod
    def empty(cls, channels: int) -> Statistics:
        """Of no pixels."""
        return cls(0, torch.zeros(channels, dtype=torch.double),
                   torch.zeros(channels, channels, dtype=torch.double))

    def add(self, x: Tensor) -> None:
        """Add pixels (pixels, channels)."""
        x = x.float()
        self.count += len(x)
        self.total += x.sum(0).double()
        self.products += (x.t() @ x).double()

    def covariance(self) -> tuple[Tensor, Tensor]:
        """The mean (channels,) and the covariance (channels, channels)."""
        mean = self.total / self.count
        return mean, self.products / self.count - torch.outer(mean, mean)


class Use(NamedTuple):
    """Of the same channels by a layer.

    Args:
        covariance: (channels, channels), of the layer's input.
        gram: (channels, channels): the products of the layer's weights, summed over its outputs.
    """

    covariance: Tensor
    gram: Tensor


def select(uses: Sequence[Use], count: int) -> Tensor:
    """The channels from which those layers' outputs can be computed best, in ascending order.

    Forward selection: each takes the channel that explains most of the variance of the outputs
    which those before leave. Outputs of several layers count relative to their variance.
    """
    left = [use.covariance.clone() for use in uses]
    whole = [(use.covariance * use.gram).sum().clamp(min=1e-20) for use in uses]
    least = [RIDGE * use.covariance.diagonal().mean().clamp(min=1e-20) for use in uses]
    chosen = torch.zeros(len(left[0]), dtype=torch.bool)
    for _ in range(count):
        gain = sum(((c @ use.gram) * c).sum(1) / (c.diagonal().clamp(min=0) + r) / total
                   for c, use, total, r in zip(left, uses, whole, least, strict=True))
        assert isinstance(gain, Tensor)
        best = int(gain.masked_fill(chosen, -torch.inf).argmax())
        chosen[best] = True
        for c, r in zip(left, least, strict=True):
            c -= torch.outer(c[best], c[best]) / (c[best, best].clamp(min=0) + r)
    return chosen.nonzero()[:, 0]


def substitution(statistics: Statistics, keep: Tensor, prior: Tensor | None = None
                 ) -> tuple[Tensor, Tensor]:
    """The first channels from those kept: a matrix (channels, kept), what to add (channels,).

    Args:
        statistics: Of all channels and of those kept.
        keep: The channels that are kept, (kept,).
        prior: A matrix that holds where the pixels are too few. By default the first channels are
            all, and each is computed from itself, if it is kept.
    """
    mean, covariance = statistics.covariance()
    if prior is None:
        prior = torch.zeros(len(mean), len(keep), dtype=mean.dtype)
        prior[keep, torch.arange(len(keep))] = 1
    own, count = covariance[keep][:, keep], len(prior)
    ridge = RIDGE * own.diagonal().mean().clamp(min=1e-20) * torch.eye(len(keep), dtype=own.dtype)
    left = covariance[keep][:, :count] - own @ prior.t()
    matrix = prior + torch.linalg.solve(own + ridge, left).t()
    return matrix, mean[:count] - matrix @ mean[keep]
