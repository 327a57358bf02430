"""Structures whose loss is measured, so that whole curves of predicted losses can be scaled by it.

A predicted loss orders the ranks of one layer well, but is off by a factor that differs from layer to layer: it takes
errors for small, and gradients and inputs for independent. One measurement per curve, of a layer or of a block, gives this
factor: `loss(r) = KL(r₀) · tail(r) / tail(r₀)` (LEMS).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .choice import LayerChoice
from .problem import LayerProfile
from .sites import SiteProfile


@dataclass(frozen=True)
class Probe:
    """A structure to measure.

    Attributes:
        name: Name of the curve: of a layer or a site.
        choices: The structure, by canonical name of a layer.
        loss: Its predicted loss.
    """

    name: str
    choices: Mapping[str, LayerChoice]
    loss: float


def probe_of(profile: LayerProfile | SiteProfile, share: float, members: Sequence[str] = ()) -> list[Probe]:
    """Return the probe of a curve, or nothing if no structure saves anything or loses anything.

    Args:
        profile: Options and losses.
        share: Share of the dense cost that the probe may keep; if no option is that small, the smallest is taken.
        members: Canonical names of the layers that a joint layer stands for.
    """
    fitting = int(np.searchsorted(profile.option_costs, share * profile.dense_cost, side="right")) - 1
    index = max(fitting, 0)
    option, loss = profile.options[index], float(profile.option_losses[index])
    if option is None or loss <= 0:
        return []
    if isinstance(profile, SiteProfile):
        assert isinstance(option, tuple)  # a choice for each layer of the site
        return [Probe(profile.name, dict(zip(profile.layers, option, strict=True)), loss)]
    assert isinstance(option, int)  # the option of a single layer that is not dense
    names = members or (profile.name,)
    return [Probe(profile.name, {name: LayerChoice(option, shared=bool(members)) for name in names}, loss)]
