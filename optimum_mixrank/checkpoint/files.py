"""Sizes of models in memory and on disk.

Only the headers of weight files are read. Whatever reads them raises the errors of `safetensors_files`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..runtime.formatting import quote, shorten


_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class StoredTensor(NamedTuple):
    """A tensor as described in the header of its file.

    Attributes:
        shape: Its shape.
        dtype: Its dtype as safetensors calls it, such as `"F32"`.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen; one that is used in several places counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def safetensors_files(folder: str | Path) -> list[Path]:
    """Return the weight files of a Transformers checkpoint: `model.safetensors`, or the shards in its index.

    Where there are none, files that were saved with a `variant` count, as `model.fp16.safetensors`, if it is the only one.

    Raises:
        FileNotFoundError: if there is no such file, or a shard is missing.
        ValueError: if the index is malformed or lists a file outside the folder.
    """
    folder = Path(folder)
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if not index.is_file() and not single.is_file():
        # Names of shards hold a hyphen.
        whole = [each for each in folder.glob("model.*.safetensors") if "-" not in each.name]
        variants = [*folder.glob("model.safetensors.index.*.json"), *whole]
        if len(variants) == 1:
            index, single = variants[0], variants[0]
    is_sharded = index.is_file() and index.suffix == ".json"
    files = [folder / name for name in _shard_names(index)] if is_sharded else [single]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {file.name}; it must be a checkpoint in safetensors, as `save_pretrained` "
                "writes it."
            )
    return files


def _shard_names(index: Path) -> list[str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{str(index)!r} has no `weight_map`, which names the file of every tensor.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{str(index)!r} lists {quote(name)}, which is not a file beside it.")
    return sorted(set(weight_map.values()))


def read_json(file: Path) -> Any:
    """Return the content of a JSON file, which may be untrusted.

    Raises:
        ValueError: if it is no JSON that Python can hold.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged: {shorten(str(error))}") from error


def safetensors_bytes(folder: str | Path) -> int:
    """Return the size in bytes of a checkpoint's weight files, headers included."""
    return sum(file.stat().st_size for file in safetensors_files(folder))


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint by name, as the headers of its file or shards describe them.

    Raises:
        ValueError: as `tensors_in`.
    """
    return tensors_in(safetensors_files(folder))


def tensors_in(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by name, as their headers describe them.

    Raises:
        ValueError: if two files hold a tensor of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is not a mapping
                if name in tensors:
                    raise ValueError(
                        f"Tensor {quote(name)} is in {path.name} and in another shard; save the model again."
                    )
                header = file.get_slice(name)
                tensors[name] = StoredTensor(tuple(header.get_shape()), header.get_dtype())
    return tensors


def stored_dtype(folder: str | Path) -> str | None:
    """Return the dtype of most values of a checkpoint as torch calls it, such as `"float16"`, or None for other dtypes."""
    values: Counter[str] = Counter()
    for tensor in stored_tensors(folder).values():
        values[tensor.dtype] += tensor.num_values
    return _TORCH_NAMES.get(values.most_common(1)[0][0]) if values else None


def check_saved_files(model: nn.Module, folder: str | Path) -> None:
    """Check that a checkpoint holds as many values as the model that was saved there.

    Tensors that share their memory are stored, and counted, once, or once for each place; see `held_twice`.

    Raises:
        ValueError: if the files hold more or fewer values than the model's state.
    """
    from .held_twice import further_places

    on_disk = sum(tensor.num_values for tensor in stored_tensors(folder).values())
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    further = further_places(model)
    sizes, repeated = {}, 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored:
            # Tensors on the meta device have no memory to identify them by, but tied ones are the same object.
            key = id(tensor) if tensor.is_meta else (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
            sizes[key] = tensor.numel()
            repeated += tensor.numel() if name in further else 0
    in_memory = sum(sizes.values())
    if on_disk not in (in_memory, in_memory + repeated):
        raise ValueError(
            f"The safetensors files in {str(folder)!r} hold {on_disk:,} values, the {type(model).__name__} "
            f"{in_memory:,}; the checkpoint does not belong to this model. Save it again."
        )
