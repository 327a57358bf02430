"""Saving models that hold a layer in two places without declaring it, as CoaT shares convolutions between blocks.

Transformers refuses to write such weights. Written once for each place, they are read into the same layer again.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from transformers import modeling_utils


def further_places(model: nn.Module) -> set[str]:
    """Return all names but the first of each parameter that a model holds in several places undeclared.

    Weights that a model declares to be shared are Transformers' own affair.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    several = [names for names in places.values() if len(names) > 1]
    if not several:
        return set()
    # In 4.57 and 5.x alike.
    declared = modeling_utils._get_tied_weight_keys(model) or ()
    undeclared = [[name for name in names if not any(re.search(each, name) for each in declared)] for names in several]
    return {name for names in undeclared for name in names[1:]}


def state_of_every_place(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the tensors to save, with a copy for each further place; None if there are no such places."""
    further = further_places(model)
    if not further:
        return None
    return {name: tensor.clone() if name in further else tensor for name, tensor in model.state_dict().items()}
