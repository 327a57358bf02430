"""Names of layers in checkpoints that another release of Transformers has written.

Releases differ in what they call the modules around a stack of blocks, not in what they call the layers inside: the tower
that 4.57 knows as `vision_model.encoder.layers` is `encoder.layers` in 5.x. A rank map is therefore read stack by stack.
The *root* of a layer is its name up to the number of the block, `encoder.layers`, and what follows is its *place*,
`0.mlp.fc1`; of a layer outside of blocks the place is its own name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from .names import (
    all_conversions,
    canonical_names,
    loading_renamings,
    names_on_disk,
    prefix_changes,
    reads_back,
    saving_conversions,
)
from .rank_map import FactoredLayer
from .stacking import CONVERSIONS, saved_by


def under_present_names(model: nn.Module, layers: Mapping[str, FactoredLayer]) -> dict[str, FactoredLayer]:
    """Return a rank map with the canonical names that its layers have in a model under the installed release.

    Layers that the model does not have under any name keep theirs.

    Args:
        model: The model.
        layers: The entries of a rank map by the canonical names of the release that wrote it.
    """
    present = _present_names(model, list(layers))
    if not present:
        return dict(layers)
    found = {}
    for name, layer in layers.items():
        members = layer.members and tuple(present.get(member, member) for member in layer.members)
        found[present.get(name, name)] = replace(layer, members=members)
    return found


_FIND_NAMES = "_get_key_renaming_mapping"
"""The method of a model in which Transformers 4.57 finds the name that each tensor of a file has in the model."""


def read_renamed(model: nn.Module, stored: Iterable[str], present: Iterable[str]) -> None:
    """Make Transformers 4.57 find the tensors of a file whose stacks another release has named otherwise.

    What lies around a stack, such as the embeddings before it, has the same other name. Transformers 5 knows the names of
    older releases by itself. A tensor is renamed only if the model lacks its name and has the other one.

    Args:
        model: The model, in which the factored layers are; its method is as before once it has been called.
        stored: The canonical names of its factored layers in the checkpoint.
        present: The names that these have in the model, in the same order.
    """
    find = getattr(model, _FIND_NAMES, None)
    pairs = {
        _differing(_root_and_place(old)[0], _root_and_place(new)[0]) for old, new in zip(stored, present, strict=True)
    }
    pairs = {(old, new) for old, new in pairs if old != new}
    if find is None or not pairs:
        return

    def renamed(*args: Any, **kwargs: Any) -> dict[str, str]:
        delattr(model, _FIND_NAMES)
        found = find(*args, **kwargs)
        wanted = set(model.state_dict())
        lacking = wanted - set(found.values())
        for key, name in found.items():
            others = [each for pair in sorted(pairs) for each in _exchanged(name, *pair)] if name not in wanted else []
            found[key] = next((each for each in others if each in lacking), name)
            lacking.discard(found[key])
        return found

    setattr(model, _FIND_NAMES, renamed)


def _differing(root: str, other: str) -> tuple[str, str]:
    """Return two roots without the parts that their ends have in common."""
    count = _common_end(root, other)
    old, new = root.split("."), other.split(".")
    return ".".join(old[: len(old) - count]), ".".join(new[: len(new) - count])


def _exchanged(name: str, old: str, new: str) -> Iterator[str]:
    """Yield a name with each run of its parts that is `old` exchanged for `new`, or with `new` put in before each part."""
    parts, run, other = name.split("."), old.split(".") if old else [], new.split(".") if new else []
    for start in range(len(parts) - len(run)):
        if parts[start : start + len(run)] == run:
            yield ".".join([*parts[:start], *other, *parts[start + len(run) :]])


def _present_names(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return the canonical names of layers that a rank map calls otherwise, by what it calls them."""
    canonical = canonical_names(model)
    known = set(canonical.values())
    places: dict[str, dict[str, str]] = {}
    for name, on_disk in names_on_disk(model).items():
        for spelling in (canonical[name], on_disk, name):
            root, place = _root_and_place(spelling)
            places.setdefault(root, {})[place] = canonical[name]
    found: dict[str, str] = {}
    for root, members in _by_root(names).items():
        # A stack that the model has under this name is left as it is, even if some of its layers are lacking.
        if known.isdisjoint(members):
            there = _counterpart(
                root, {_root_and_place(each)[1] for each in members}, places, loading_renamings(model)
            )
            found.update({each: there[place] for each in members if (place := _root_and_place(each)[1]) in there})
    return found if len(set(found.values())) == len(found) and known.isdisjoint(found) else {}


def _counterpart(
    root: str, wanted: set[str], places: Mapping[str, Mapping[str, str]], renamings: Sequence[Callable[[str], str]]
) -> Mapping[str, str]:
    """Return the layers, by place, of the one stack of a model that a root in a rank map stands for; none if unclear."""
    spellings = {root, *(rename(f"{root}.0.").removesuffix(".0.") for rename in renamings)}
    scores: dict[tuple[int, int], list[Mapping[str, str]]] = {}
    for candidate, layers in places.items():
        blocks = {place.partition(".")[0] for place in layers}
        # The model may have been opened with fewer blocks.
        inside = {place for place in wanted if place.partition(".")[0] in blocks}
        if not inside or not inside <= layers.keys():
            continue
        common = [_common_end(each, candidate, _singular) for each in spellings if _may_be(each, candidate)]
        if common:
            scores.setdefault((len(inside), max(common)), []).append(layers)
    if not scores:
        return {}
    best = scores[max(scores)]
    # One stack may be there under several spellings.
    return best[0] if all(set(each.values()) == set(best[0].values()) for each in best) else {}


def _may_be(root: str, other: str) -> bool:
    """Return whether one of two roots is the other with more modules around or between its own."""
    short, long = sorted(([_singular(part) for part in each.split(".") if part] for each in (root, other)), key=len)
    rest = iter(long)
    return all(part in rest for part in short)


def _singular(part: str) -> str:
    """Return the part of a name without the difference between `layer` and `layers`, which some releases write."""
    return part.removesuffix("s")


def _common_end(root: str, other: str, alike: Callable[[str], str] = str) -> int:
    """Return how many parts the ends of two roots have in common, under what is alike in them."""
    count = 0
    for own, its in zip(reversed(root.split(".")), reversed(other.split(".")), strict=False):
        if alike(own) != alike(its):
            break
        count += 1
    return count


def _by_root(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_root_and_place(name)[0], []).append(name)
    return groups


def _root_and_place(name: str) -> tuple[str, str]:
    """Divide the name of a layer into its root and its place."""
    match = re.match(r"(.*?)\.(\d+(?:\..*)?)$", name)
    root, _, place = (match[1], ".", match[2]) if match else name.rpartition(".")
    return root, place


@contextmanager
def stored_with_prefixes(model: nn.Module) -> Iterator[None]:
    """Make Transformers save a model under the names that files on the Hub have, which all releases know.

    Transformers 5 knows some towers by names without the prefix that they have on the Hub. It writes the prefix again where
    it has read it, but not for a model that was made from a configuration.
    """
    known = vars(model).get(CONVERSIONS)
    base = saving_conversions(model) if known is None else known
    lacking = [each for each in prefix_changes(model) if not _is_among(each, base) and not _is_doubled(each)]
    conversions = _in_order([*base, *lacking], all_conversions(model))
    if not lacking or not reads_back(model, conversions):
        yield
        return
    with saved_by(model, conversions):
        yield


def _in_order(conversions: Sequence[Any], order: Sequence[Any]) -> list[Any]:
    """Return conversions in the order in which Transformers makes them; what it does not list comes where it was."""
    places = {_key(each): place for place, each in reversed(list(enumerate(order)))}
    found: list[Any] = []
    for each in conversions:
        own = places.get(_key(each), len(order))
        after = (at for at, other in enumerate(found) if places.get(_key(other), -1) > own)
        found.insert(next(after, len(found)), each)
    return found


def _is_among(change: Any, conversions: Sequence[Any]) -> bool:
    return _key(change) in map(_key, conversions)


def _key(conversion: Any) -> tuple[str, ...]:
    names = ("prefix_to_add", "prefix_to_remove", "scope_prefix", "source_patterns", "target_patterns")
    return (type(conversion).__name__, *(str(getattr(conversion, name, None)) for name in names))


def _is_doubled(change: Any) -> bool:
    """Return whether a tower has the name that is its prefix by itself: as a part of a classifier it has no other one."""
    scope = getattr(change, "scope_prefix", None)
    if scope == "":
        scope = getattr(change, "base_model_prefix", None)
    return scope is not None and scope.rpartition(".")[2] == change.prefix_to_remove
