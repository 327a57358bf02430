"""Register the checkpoint format with Transformers, without importing Transformers.

`transformers.quantizers` imports torch, which takes seconds. A finder on `sys.meta_path` therefore waits for the module
that holds Transformers' registries, and adds the format as soon as that module has been executed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .quantizer import Compress


_REGISTRIES = "transformers.quantizers.auto"


def install(compress: Compress) -> None:
    """Register the format now if Transformers' registries are loaded already, otherwise as soon as they are.

    Args:
        compress: Compresses a dense model that was loaded with a `MixRankConfig`.
    """

    def register(registries: ModuleType) -> None:
        # These imports may reach no further than transformers.quantizers.base and transformers.utils: Transformers is
        # only partly loaded at this moment.
        from .configuration import MixRankConfig
        from .quantizer import MixRankHfQuantizer
        from .rank_map import QUANT_METHOD

        MixRankHfQuantizer.compress = staticmethod(compress)
        if QUANT_METHOD not in registries.AUTO_QUANTIZATION_CONFIG_MAPPING:
            registries.register_quantization_config(QUANT_METHOD)(MixRankConfig)
        if QUANT_METHOD not in registries.AUTO_QUANTIZER_MAPPING:
            registries.register_quantizer(QUANT_METHOD)(MixRankHfQuantizer)

    module = sys.modules.get(_REGISTRIES)
    # A module that is still being executed has no registries yet.
    if module is not None and hasattr(module, "register_quantizer"):
        register(module)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder(register))


class _RegistryFinder(MetaPathFinder):
    """Calls a function once the registries' module has been executed; ignores every other module."""

    def __init__(self, register: Callable[[ModuleType], None]) -> None:
        self._register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRIES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self._register(module)

            setattr(spec.loader, "exec_module", execute_and_register)  # noqa: B010 - mypy allows no plain assignment
        return spec
