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
    """

    rank: int
    bias: bool

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
    if not isinstance(name, str) or not isinstance(entry, Mapping) or set(entry) != {"rank", "bias"}:
        raise ValueError(f"rank_map entry {name!r}: {entry!r} must have the keys `rank` and `bias`.")
    rank, bias = entry["rank"], entry["bias"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank_map entry {name!r}: rank={rank!r} is not a positive integer.")
    if not isinstance(bias, bool):
        raise ValueError(f"rank_map entry {name!r}: bias={bias!r} is neither true nor false.")
    return FactoredLayer(rank, bias)
