"""The stored layout of a compressed checkpoint: which layers are factored, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass


# Raised whenever the meaning of stored tensors or of the rank map changes.
LAYOUT_VERSION = 1


@dataclass(frozen=True)
class FactoredLayer:
    """One factored layer of a checkpoint.

    Attributes:
        rank: Inner dimension of the two factors, `[rank, in_features]` and `[out_features, rank]`.
        bias: Whether the factored layer stores a bias `[out_features]`.
        added_bias: Whether that bias exists only because centring gave one to a layer that had none; it would count as
            stored parameters of the compression. Layers without bias are decomposed uncentred and get none.
    """

    rank: int
    bias: bool
    added_bias: bool = False

    def to_dict(self) -> dict[str, int | bool]:
        """The JSON form, as it stands in `config.json`."""
        return asdict(self)


def parse_rank_map(rank_map: object) -> dict[str, FactoredLayer]:
    """Check a rank map, which may come from an untrusted file, and turn it into objects.

    Raises:
        ValueError: names the entry that is malformed.
    """
    if not isinstance(rank_map, Mapping):
        raise ValueError(
            f"rank_map is a {type(rank_map).__name__}, not a mapping from layer names; do not set it by hand."
        )
    return {name: _parse_entry(name, entry) for name, entry in rank_map.items()}


def _parse_entry(name: object, entry: object) -> FactoredLayer:
    fields = {"rank", "bias", "added_bias"}
    if not isinstance(name, str) or not isinstance(entry, Mapping) or not {"rank", "bias"} <= set(entry) <= fields:
        raise ValueError(f"rank_map entry {name!r}: {entry!r} must have the keys `rank`, `bias` and `added_bias`.")
    rank, bias, added_bias = entry["rank"], entry["bias"], entry.get("added_bias", False)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank_map entry {name!r}: rank={rank!r} is not a positive integer.")
    if not isinstance(bias, bool) or not isinstance(added_bias, bool) or (added_bias and not bias):
        raise ValueError(f"rank_map entry {name!r}: bias={bias!r}, added_bias={added_bias!r} do not go together.")
    return FactoredLayer(rank, bias, added_bias)
