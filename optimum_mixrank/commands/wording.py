"""Messages of the Python interface in the words of the command line: `overwrite=True` becomes `--overwrite`."""

from __future__ import annotations

import ast
import re
from typing import Any

from .fields import FIELDS


OPTIONS = {
    **{name: f"--{field.option}" for name, field in FIELDS.items()},
    "auto_class": "--auto-class",
    "batch_size": "--batch-size",
    "calibration_dataset": "--dataset",
    "device": "--device",
    "dtype": "--dtype",
    "evaluate_split": "--evaluate-split",
    "image_column": "--image-column",
    "label_column": "--label-column",
    "max_broken_share": "--max-broken-share",
    "max_image_pixels": "--max-image-pixels",
    "max_memory": "--max-memory",
    "num_workers": "--num-workers",
    "overwrite": "--overwrite",
    "pixel_values_shape": "--image-size",
    "runtime": "--runtime",
    "save_directory": "--output",
    "split": "--split",
    "streaming": "--streaming",
    "trust_remote_code": "--trust-remote-code",
}
"""Options by the name of the argument."""

_NAMES = "|".join(sorted(OPTIONS, key=len, reverse=True))
_VALUE = r"\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^\s,;:)\]`]*[^\s,;:)\].?`]"
_ASSIGNMENT = re.compile(rf"`?(?<![\w.\-/'\"])({_NAMES})=({_VALUE})`?")
# A name with an underscore stands for the argument wherever it is; a value that is quoted, or part of a path, does not.
_BARE = re.compile(
    rf"(?<![\w.\-/'\"`])({'|'.join(name for name in OPTIONS if '_' in name)}|include(?= has '))(?![\w=/'\"`\[]|\.\w| was )"
)
_ENTRY = re.compile(r"\b(rank_pattern|ratio_pattern)\['([^']*)'\]=")
_QUOTED = re.compile(rf"`({_NAMES})`")


def in_words_of_the_command_line(message: str) -> str:
    """Return a message with arguments of the Python interface replaced by the options that set them."""
    replaced = _ASSIGNMENT.sub(lambda match: _option(match[1], match[2]), message)
    replaced = _ENTRY.sub(lambda match: f"{OPTIONS[match[1]]} {match[2]}=", replaced)
    replaced = _BARE.sub(lambda match: OPTIONS[match[1]], replaced)
    return _QUOTED.sub(lambda match: OPTIONS[match[1]], replaced)


def _option(name: str, text: str) -> str:
    option = OPTIONS[name]
    try:
        value: Any = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        # Not a value but a placeholder, such as `…`.
        return f"{option} {text}"
    if value is None:
        return f"{option} (not given)"
    if value is True:
        return option
    if value is False:
        return f"--no-{option.removeprefix('--')}"
    if isinstance(value, list):
        return f"{option} {' '.join(map(str, value)) or 'none'}"
    has_spaces = isinstance(value, str) and re.search(r"\s", value)
    return f"{option} {text if has_spaces else value}"
