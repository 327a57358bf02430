"""The base class of models that are opened with the code in their checkpoint.

The class and all that it uses are copied into that code; see `self_contained`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .completeness import check_initialized
from .loading import insert_factored_layers
from .rank_map import check_layout_version, parse_rank_map
from .stacking import stored_apart


class SelfContainedModel(PreTrainedModel):
    """A model whose layers are replaced by those in its rank map as soon as it is built.

    The rank map is stored where the plugin looks for it, as `quantization_config`. In memory it is `config.mixrank`: a
    program without the plugin would be warned of a method that it does not know, and the plugin would replace the layers a
    second time.

    Attributes:
        auto_map: What `config.json` says about the classes in this file; set by the classes in it.
    """

    is_self_contained = True

    auto_map: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _move(self.config, "quantization_config", "mixrank")
        stored = getattr(self.config, "mixrank", None)
        if not isinstance(stored, Mapping):
            raise ValueError("config.json holds no `quantization_config` with a rank map. The checkpoint is damaged.")
        check_layout_version(stored.get("layout_version"), stored.get("library_version"))
        device = next(self.parameters()).device
        insert_factored_layers(self, parse_rank_map(stored.get("rank_map")))
        if device.type != "meta":
            self._fill(device)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a model as any other of Transformers."""
        names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        if not isinstance(config, PretrainedConfig):
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub, **kwargs)
        config = copy.deepcopy(config)
        _move(config, "quantization_config", "mixrank")
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **hub, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as any other of Transformers, together with this file."""
        if Path(save_directory).is_file():
            raise NotADirectoryError(f"save_directory={str(save_directory)!r} is a file; name a folder.")
        with self._described(), stored_apart(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False: the modules have the names that they have in Transformers, which renames them on disk."""
        return False

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        check_initialized(self, args)
        super()._initialize_missing_keys(*args, **kwargs)

    @torch.no_grad()
    def _fill(self, device: torch.device) -> None:
        """Give the new layers of a model that is not loaded random values, as its other layers have."""
        for module in self.modules():
            if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                self._init_weights(module)

    @contextmanager
    def _described(self) -> Iterator[None]:
        """Make the configuration what `config.json` has to hold."""
        before = getattr(self.config, "auto_map", None)
        _move(self.config, "mixrank", "quantization_config")
        # Without the name of the repository that the code came from: the new checkpoint has its own.
        self.config.auto_map = {**(before or {}), **self.auto_map}
        try:
            yield
        finally:
            _move(self.config, "quantization_config", "mixrank")
            self.config.auto_map = before


def _move(config: Any, source: str, destination: str) -> None:
    """Rename a field of a configuration, whose value the plugin may have parsed."""
    stored = vars(config).pop(source, None)
    if stored is not None:
        setattr(config, destination, stored if isinstance(stored, Mapping) else stored.to_dict())
