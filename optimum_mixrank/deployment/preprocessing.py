"""Whether the image processor beside an exported model prepares images as that of its source does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from ..runtime.formatting import quote


FILE_NAME = "preprocessor_config.json"

_WITHOUT_EFFECT = ("image_processor_type", "processor_class", "data_format", "return_tensors", "device")
"""Settings on which values of pixels do not depend."""


def preprocessing_problems(image_processor: Any, exported: str | Path) -> tuple[str, ...]:
    """Return in which settings the image processor of an exported model differs from that of its source, in words.

    Args:
        image_processor: That of the source; None if it has none.
        exported: The exported model, a file or a folder; nothing differs if no image processor lies beside it.
    """
    path = Path(exported).expanduser()
    file = (path if path.is_dir() else path.parent) / FILE_NAME
    if image_processor is None or not file.is_file():
        return ()
    found, expected = (_settings(each) for each in (AutoImageProcessor.from_pretrained(file.parent), image_processor))
    return tuple(
        f"{FILE_NAME} beside the exported model has {name}={quote(found.get(name))}, that of the checkpoint "
        f"{quote(expected.get(name))}"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    )


def _settings(image_processor: Any) -> Mapping[str, Any]:
    """Return settings as JSON values, in which a tuple equals a list."""
    settings = json.loads(image_processor.to_json_string())
    return {name: value for name, value in settings.items() if name.lstrip("_") not in _WITHOUT_EFFECT}
