"""The stored layout of a compressed checkpoint: which layers are factored, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..runtime.formatting import quote
from ..runtime.version import __version__


QUANT_METHOD = "mixrank"
"""The quantization method by which Transformers knows a compressed checkpoint."""

LAYOUT_VERSION = 1
"""Raised whenever the meaning of stored tensors or of the rank map changes."""

MIXED_VERSION = 2
"""The version of checkpoints with layers that share a factor or have lost units, which earlier versions cannot read."""

LAYOUT_NAMES = ("factors", "pivoted")

DENSE = "dense"
"""The layout of a dense layer that has lost units."""

MAX_MEMBERS = 64
"""More layers than any block has that see the same input."""

MAX_CHUNKS = 8
"""More parts than any first layer of an MLP stacks."""

MAX_LAYERS = 10_000
"""More factored layers than any model has."""

MAX_ROWS = 2**24
"""More outputs than any linear layer has."""


@dataclass(frozen=True)
class FactoredLayer:
    """The entry of a layer in the rank map: factored, or dense with fewer units than the original.

    Attributes:
        rank: Inner dimension of the two factors; None for a dense layer.
        bias: Whether the layer stores a bias, `[out_features]` values.
        layout: `"factors"`: two factors, `[rank, in_features]` and `[out_features, rank]`; `"pivoted"`: pivot rows
            `[rank, in_features]` and the coefficients of the others, `[out_features - rank, rank]`; `"dense"`.
        pivots: The pivot rows of a pivoted layer as a mask, see `encode_rows`; None for the first `rank` rows.
        members: Canonical names of the layers that share the first factor, the same in the entry of each. Their rows are
            stacked in this order in one factored layer, which the first of them holds; `pivots` are rows of that one.
        shape: The present shape, `(out_features, in_features)`, if units were removed.
        dense_shape: The original's shape, if units were removed.
        chunks: Number of stacked parts of the outputs that have lost the same units: 2 where it gives gates and values.
    """

    rank: int | None
    bias: bool
    layout: str = "factors"
    pivots: str | None = None
    members: tuple[str, ...] | None = None
    shape: tuple[int, int] | None = None
    dense_shape: tuple[int, int] | None = None
    chunks: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, without what is not there."""
        values = {
            name: value for name, value in asdict(self).items() if value is not None and value != _DEFAULTS.get(name)
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def is_mixed(self) -> bool:
        """Whether it takes more than two factors of its own to describe the layer."""
        return self.members is not None or self.shape is not None


_DEFAULTS = {"chunks": 1}


def layout_version(entries: Iterable[FactoredLayer]) -> int:
    """Return the oldest version of the stored layout that can describe these layers."""
    return MIXED_VERSION if any(entry.is_mixed for entry in entries) else LAYOUT_VERSION


def check_layout_version(version: object, written_by: object) -> None:
    """Check that this version can read a stored layout.

    Args:
        version: Version of the layout.
        written_by: Version of this library that wrote it.

    Raises:
        ValueError: for an unknown version of the layout, since the weights would be misread.
    """
    if version not in (LAYOUT_VERSION, MIXED_VERSION):
        raise ValueError(
            f"layout_version={quote(version)} is unknown to optimum-mixrank {__version__}, which "
            f"reads versions {LAYOUT_VERSION} and {MIXED_VERSION}. The checkpoint was written by optimum-mixrank "
            f"{quote(written_by)}; upgrade with `pip install --upgrade optimum-mixrank`."
        )


def quantization_method(settings: object) -> Any:
    """Return the `quant_method` of the quantization settings of a model, parsed or as read from a file; None without."""
    method = settings.get("quant_method") if isinstance(settings, Mapping) else getattr(settings, "quant_method", None)
    return getattr(method, "value", method)


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
    entries = {name: _parse_entry(name, entry) for name, entry in rank_map.items()}
    for name, entry in entries.items():
        _check_members(name, entry, entries)
    return entries


def _parse_entry(name: object, stored: object) -> FactoredLayer:
    entry = dict(stored) if isinstance(stored, Mapping) else {}
    needed = {"bias", "shape"} if entry.get("layout") == DENSE else {"rank", "bias"}
    if not isinstance(name, str) or not needed <= entry.keys() <= {each.name for each in fields(FactoredLayer)}:
        raise ValueError(
            f"rank_map entry {quote(name)}: {quote(stored)} must have the keys `rank`, `bias` and `layout`."
        )
    rank, bias, layout = entry.get("rank"), entry["bias"], entry.get("layout", "factors")
    if layout == DENSE and (rank is not None or "members" in entry):
        raise ValueError(f"rank_map entry {quote(name)}: a dense layer has neither rank nor members.")
    if layout != DENSE and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank_map entry {quote(name)}: rank={quote(rank)} is not a positive integer.")
    if not isinstance(bias, bool):
        raise ValueError(f"rank_map entry {quote(name)}: bias={quote(bias)} is neither true nor false.")
    if layout not in (*LAYOUT_NAMES, DENSE):
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
    shape, dense_shape = (_parse_shape(name, key, entry.get(key)) for key in ("shape", "dense_shape"))
    chunks = entry.get("chunks", 1)
    if not isinstance(chunks, int) or isinstance(chunks, bool) or not 1 <= chunks <= MAX_CHUNKS:
        raise ValueError(
            f"rank_map entry {quote(name)}: chunks={quote(chunks)} is not an integer from 1 to {MAX_CHUNKS}."
        )
    if (shape is None) != (dense_shape is None) or (shape is None and (chunks > 1 or layout == DENSE)):
        raise ValueError(f"rank_map entry {quote(name)}: `shape`, `dense_shape` and `chunks` belong together.")
    if shape is not None and dense_shape is not None and not _fits(shape, dense_shape, chunks):
        raise ValueError(
            f"rank_map entry {quote(name)}: the shape {quote(list(shape))} with chunks={chunks} is not what is left of "
            f"{quote(list(dense_shape))}."
        )
    return FactoredLayer(rank, bias, layout, pivots, _parse_members(name, entry), shape, dense_shape, chunks)


def _parse_shape(name: object, key: str, stored: object) -> tuple[int, int] | None:
    if stored is None:
        return None
    if (
        not isinstance(stored, list | tuple)
        or len(stored) != 2
        or not all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MAX_ROWS for size in stored)
    ):
        raise ValueError(
            f"rank_map entry {quote(name)}: {key}={quote(stored)} is not a shape of two positive integers."
        )
    return stored[0], stored[1]


def _fits(shape: tuple[int, int], dense_shape: tuple[int, int], chunks: int) -> bool:
    smaller = shape[0] <= dense_shape[0] and shape[1] <= dense_shape[1] and shape != dense_shape
    return smaller and shape[0] % chunks == 0 and dense_shape[0] % chunks == 0


def _parse_members(name: object, entry: Mapping[str, Any]) -> tuple[str, ...] | None:
    members = entry.get("members")
    if members is None:
        return None
    if (
        not isinstance(members, list | tuple)
        or not 2 <= len(members) <= MAX_MEMBERS
        or not all(isinstance(each, str) for each in members)
        or len(set(members)) != len(members)
        or name not in members
    ):
        raise ValueError(
            f"rank_map entry {quote(name)}: members={quote(members)} is not a list of 2 to {MAX_MEMBERS} different layers, "
            "itself among them."
        )
    if "pivots" in entry and name != members[0]:
        raise ValueError(f"rank_map entry {quote(name)}: the pivots belong to the first member, {quote(members[0])}.")
    return tuple(members)


def _check_members(name: str, entry: FactoredLayer, entries: Mapping[str, FactoredLayer]) -> None:
    """Check that all layers that share a factor say so in the same way."""
    for member in entry.members or ():
        other = entries.get(member)
        if other is None or (other.rank, other.bias, other.layout, other.members) != (
            entry.rank,
            entry.bias,
            entry.layout,
            entry.members,
        ):
            raise ValueError(
                f"rank_map entry {quote(name)} shares its first factor with {quote(member)}, whose entry does not agree."
            )
