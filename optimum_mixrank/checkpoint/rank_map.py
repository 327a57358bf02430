"""The stored layout of a compressed checkpoint: which layers are factored, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from ..runtime.formatting import quote


QUANT_METHOD = "mixrank"
"""The quantization method by which Transformers knows a compressed checkpoint."""

LAYOUT_VERSION = 1
"""Raised whenever the meaning of stored tensors or of the rank map changes."""

LAYOUT_NAMES = ("factors", "pivoted")

MAX_LAYERS = 10_000
"""More factored layers than any model has."""

MAX_ROWS = 2**24
"""More outputs than any linear layer has."""


@dataclass(frozen=True)
class FactoredLayer:
    """The entry of a factored layer in the rank map.

    Attributes:
        rank: Inner dimension of the two factors.
        bias: Whether the layer stores a bias, `[out_features]` values.
        layout: `"factors"`: two factors, `[rank, in_features]` and `[out_features, rank]`; `"pivoted"`: pivot rows
            `[rank, in_features]` and the coefficients of the others, `[out_features - rank, rank]`.
        pivots: The pivot rows of a pivoted layer as a mask, see `encode_rows`; None for the first `rank` rows.
    """

    rank: int
    bias: bool
    layout: str = "factors"
    pivots: str | None = None

    def to_dict(self) -> dict[str, int | bool | str]:
        """Return the JSON form."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def num_values(self, out_features: int, in_features: int) -> int:
        """Return the number of values stored for the weight of a layer of this shape, without bias and pivots."""
        return stored_values(out_features, in_features, self.rank, self.layout)


def encode_rows(rows: Iterable[int]) -> str:
    """Return a set of rows as a hexadecimal number whose bit i is set if it contains row i."""
    mask = 0
    for row in rows:
        mask |= 1 << row
    return f"{mask:x}"


def decode_rows(text: str) -> list[int]:
    """Return the rows that `encode_rows` was given, ascending."""
    # From binary digits: shifting a large number again and again would take quadratic time.
    return [row for row, bit in enumerate(reversed(f"{int(text, 16):b}")) if bit == "1"]


def stored_values(out_features: int, in_features: int, rank: int, layout: str) -> int:
    """Return how many values two factors take: `r (m + n)`, less `r²` in the pivoted layout."""
    values = rank * (out_features + in_features)
    return values - rank * rank if layout == "pivoted" else values


def break_even(out_features: int, in_features: int, layout: str) -> float:
    """Return the rank, seldom an integer, at which the factors take as many values as the dense weight."""
    m, n = out_features, in_features
    return float(min(m, n)) if layout == "pivoted" else m * n / (m + n)


def parse_rank_map(rank_map: object) -> dict[str, FactoredLayer]:
    """Return the entries of a rank map, which may come from an untrusted file.

    Raises:
        ValueError: for a malformed entry; the message names it.
    """
    if not isinstance(rank_map, Mapping):
        kind = type(rank_map).__name__
        raise ValueError(f"rank_map is a {kind}, not a mapping from layer names; do not set it by hand.")
    if len(rank_map) > MAX_LAYERS:
        raise ValueError(
            f"rank_map has {len(rank_map):,} layers, more than any model ({MAX_LAYERS:,} are allowed). The checkpoint is "
            "damaged."
        )
    return {name: _parse_entry(name, entry) for name, entry in rank_map.items()}


def _parse_entry(name: object, stored: object) -> FactoredLayer:
    entry = dict(stored) if isinstance(stored, Mapping) else {}
    if not isinstance(name, str) or not {"rank", "bias"} <= entry.keys() <= {"rank", "bias", "layout", "pivots"}:
        raise ValueError(
            f"rank_map entry {quote(name)}: {quote(stored)} must have the keys `rank`, `bias` and `layout`."
        )
    rank, bias, layout = entry["rank"], entry["bias"], entry.get("layout", "factors")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank_map entry {quote(name)}: rank={quote(rank)} is not a positive integer.")
    if not isinstance(bias, bool):
        raise ValueError(f"rank_map entry {quote(name)}: bias={quote(bias)} is neither true nor false.")
    if layout not in LAYOUT_NAMES:
        raise ValueError(
            f"rank_map entry {quote(name)}: layout={quote(layout)} is unknown; this version knows "
            f"{', '.join(map(repr, LAYOUT_NAMES))}. Upgrade with `pip install --upgrade optimum-mixrank`."
        )
    pivots = entry.get("pivots")
    # No mask needs more digits; a longer one would take seconds and gigabytes to be decoded.
    is_mask = isinstance(pivots, str) and len(pivots) <= MAX_ROWS // 4 and re.fullmatch("[0-9a-f]+", pivots)
    if pivots is not None and not (layout == "pivoted" and is_mask):
        raise ValueError(
            f"rank_map entry {quote(name)}: pivots={quote(pivots)} is not a hexadecimal mask of the rows of a "
            "pivoted layer."
        )
    return FactoredLayer(rank, bias, layout, pivots)
