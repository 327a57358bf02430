"""Put a complete new checkpoint in the place of an old one, and leave alone what belongs to neither."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..runtime.files import flush, temporary_path, temporary_prefix
from ..runtime.folders import INSIDE, entries, exchange, free_path, is_leftover, locked, take_place
from .rank_map import QUANT_METHOD, quantization_method


REPORT_NAME = "mixrank_report.json"

HTML_NAME = "report.html"

RANKS_NAME = "ranks.png"
"""File name of the picture of the ranks beside a checkpoint."""

CARD_NAME = "README.md"

CODE_NAME = "modeling_mixrank.py"
"""File name of the code that a checkpoint may bring; see `self_contained`."""

CARD_MARK = "compressed by optimum-mixrank"
"""Words by which a model card of this library is told from a README of the user's."""

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")

_WEIGHTS = "transformers_weights"
"""The key of `config.json` by which Transformers finds weights that have another than the usual name."""


def checkpoint_files(folder: Path) -> set[str]:
    """Return the names of the files in a folder that a checkpoint consists of, and that another one replaces.

    Configuration and weights are known by their names; an index tells the shards. Report, page, picture, card, image
    processor and shards without an index only belong to a checkpoint that this library has compressed.
    """
    found = {CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, *_shards(folder)}
    if _is_compressed(folder):
        # Shards of an earlier checkpoint, whose index is gone if a process was killed while it replaced them.
        found |= {name for name in os.listdir(folder) if _SHARD.fullmatch(name)}
        found |= {REPORT_NAME, HTML_NAME, RANKS_NAME, CODE_NAME, "preprocessor_config.json"}
        with suppress(OSError, UnicodeDecodeError):
            if CARD_MARK in (folder / CARD_NAME).read_text(encoding="utf-8"):
                found.add(CARD_NAME)
    # A folder with such a name is the user's.
    return {name for name in found if (folder / name).is_symlink() or (folder / name).is_file()}


def weights_in_use(folder: Path) -> str | None:
    """Return the temporary folder inside a checkpoint from which its weights are read.

    There is one if a process was killed while it replaced the checkpoint file by file.
    """
    name = str(_read(folder / CONFIG_NAME).get(_WEIGHTS, "")).split("/")[0]
    return name if is_leftover(name) else None


def replace_checkpoint(source: Path, destination: Path, overwrite: bool, ignored: Set[str] = frozenset()) -> None:
    """Put a complete checkpoint in its place, whatever has been written there in the meantime.

    Where the destination holds nothing but an old checkpoint, the two folders exchange their names in one step. Otherwise
    files are moved one by one, and `config.json` is replaced in one step together with the weights that it belongs to:
    until the weights have their final names, it says under which others they are. So the old or the new model opens at
    any moment. Files of the old checkpoint that the new one does not have are removed, all others stay.

    Args:
        source: A folder beside the destination or in it; it holds old files or nothing afterwards.
        destination: A folder without links, which may not exist.
        overwrite: Whether the destination may hold files.
        ignored: Names of what it may hold in any case.

    Raises:
        FileExistsError: if it holds files and may not.
        OSError: if a file cannot be moved. Both messages name the folder in which the new checkpoint then is.
    """
    try:
        if source.parent != destination and _exchanged(source, destination, overwrite):
            flush(destination.parent)
            return
        with locked(destination):
            if not overwrite and entries(destination) - ignored:
                raise FileExistsError("it holds files that were written in the meantime, and overwrite is False")
            if source.parent != destination:
                source = Path(shutil.move(source, temporary_path(destination, INSIDE)))
            _replace_files(source, destination)
    except OSError as error:
        rest = source
        if weights_in_use(destination) != source.name:
            # Beside the destination if that can be written, else where it is.
            for place in (destination.parent, source.parent):
                with suppress(OSError):
                    rest = source.rename(free_path(place / f"{destination.name}.new"))
                    break
        raise type(error)(
            f"The new checkpoint could not be put into {str(destination)!r} ({error}). What is not there yet is in "
            f"{str(rest)!r}."
        ) from error


def _exchanged(source: Path, destination: Path, overwrite: bool) -> bool:
    """Rename the new folder if nothing stands in its way that has to stay; return whether it is in its place."""
    with suppress(OSError):  # something is mounted there, for instance
        if take_place(source, destination):
            return True
    if not overwrite or not destination.is_dir():
        return False
    old = checkpoint_files(destination) | set(os.listdir(source))
    if entries(destination) - old or not exchange(source, destination):
        return False
    # What others wrote between the two lines above.
    for name in entries(source) - old:
        shutil.move(source / name, destination / name)
    return True


def _replace_files(source: Path, destination: Path) -> None:
    old = checkpoint_files(destination)
    new = set(os.listdir(source))
    weights = {name for name in new if name.endswith(".safetensors") or name == SAFE_WEIGHTS_INDEX_NAME}
    opens = (destination / CONFIG_NAME).exists()
    if opens:
        _use_weights(source, destination)
        # The old weights would otherwise be preferred to new ones of another name.
        _remove(destination, (old - new) & {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME})
    # The report first: by it, a run that is cut off here recognises its own result.
    for name in sorted(new - {CONFIG_NAME}, key=lambda name: (name != REPORT_NAME, name)):
        if opens and name in weights:
            _link(source / name, destination / name)
        else:
            (source / name).replace(destination / name)
    flush(destination)
    (source / CONFIG_NAME).replace(destination / CONFIG_NAME)
    flush(destination)
    _remove(destination, old - new)


def _use_weights(source: Path, destination: Path) -> None:
    """Replace `config.json` by the new one, which for now names the weights in the folder of the new checkpoint."""
    weights = SAFE_WEIGHTS_NAME
    if (source / SAFE_WEIGHTS_INDEX_NAME).exists():
        index = _read(source / SAFE_WEIGHTS_INDEX_NAME)
        index["weight_map"] = {key: f"{source.name}/{shard}" for key, shard in index["weight_map"].items()}
        # Transformers looks for shards beside the configuration, not beside their index.
        weights = f"moved.{SAFE_WEIGHTS_INDEX_NAME}"
        _write(source / weights, index)
    config = temporary_path(source, CONFIG_NAME)
    _write(config, {**_read(source / CONFIG_NAME), _WEIGHTS: f"{source.name}/{weights}"})
    flush(source)
    config.replace(destination / CONFIG_NAME)
    flush(destination)


def _link(source: Path, destination: Path) -> None:
    """Give a file its final name and leave it where it is; where there are no hard links, copy it."""
    temporary = temporary_path(source.parent, temporary_prefix(source.name, "-"))
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copy(source, temporary)
        flush(temporary)
    temporary.replace(destination)


def _remove(folder: Path, names: Set[str]) -> None:
    for name in sorted(names):
        (folder / name).unlink(missing_ok=True)


def _is_compressed(folder: Path) -> bool:
    settings = _read(folder / CONFIG_NAME).get("quantization_config")
    return quantization_method(settings) == QUANT_METHOD or "settings" in _read(folder / REPORT_NAME)


def _shards(folder: Path) -> set[str]:
    weight_map = _read(folder / SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, Mapping) else ()
    return {name for name in names if isinstance(name, str) and _SHARD.fullmatch(name)}


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON object that may be damaged or missing; it is empty then."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush(path)
