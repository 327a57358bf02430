"""Register the checkpoint format with Transformers, without importing Transformers.

`transformers.quantizers` loads torch, which takes seconds. A finder on `sys.meta_path` therefore waits for the module
that holds Transformers' registries and completes them the moment it has been executed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .quantizer import Compress


_REGISTRIES = "transformers.quantizers.auto"


def install(compress: Compress) -> None:
    """Register now where Transformers' registries are loaded already, else as soon as they are.

    Args:
        compress: What compresses a dense model that was loaded with a `MixRankConfig`.
    """

    def register(registries: ModuleType) -> None:
        _register(registries, compress)

    module = sys.modules.get(_REGISTRIES)
    # A module in the middle of its own execution has no registries yet; the finder cannot see it any more either.
    if module is not None and hasattr(module, "register_quantizer"):
        register(module)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder(register))


def _register(registries: ModuleType, compress: Compress) -> None:
    """Add the configuration and the quantizer class, once."""
    # These imports may reach no further than transformers.quantizers.base and transformers.utils: Transformers is only
    # partly loaded at this moment.
    from .configuration import MixRankConfig
    from .quantizer import MixRankHfQuantizer
    from .rank_map import QUANT_METHOD

    MixRankHfQuantizer.compress = staticmethod(compress)
    if QUANT_METHOD not in registries.AUTO_QUANTIZATION_CONFIG_MAPPING:
        registries.register_quantization_config(QUANT_METHOD)(MixRankConfig)
    if QUANT_METHOD not in registries.AUTO_QUANTIZER_MAPPING:
        registries.register_quantizer(QUANT_METHOD)(MixRankHfQuantizer)


class _RegistryFinder(MetaPathFinder):
    """Lets the ordinary finders find the registries' module and wraps its loader; ignores every other module."""

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
            spec.loader = _RegisteringLoader(spec.loader, self._register)
        return spec


class _RegisteringLoader(Loader):
    """Delegates to the module's own loader and registers after it."""

    def __init__(self, loader: Loader, register: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._register(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
