"""The nets in torchvision's registry, for ``torchvision.models.get_model`` and ``get_model_weights``.

Importing torchvision takes longer than importing this package, and most users of this package do not need it. So the
nets are registered once torchvision is imported, be that earlier or later.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from alexnet_fast.models.variants import VARIANTS

NAME = "alexnet_fast"  # and alexnet_fast_VARIANT; plain "alexnet" is torchvision's own
MODELS = "torchvision.models"


def register(build: Callable[..., Any], models: ModuleType) -> None:
    """Registers ``build`` and its variants with ``models``, which is torchvision's."""
    # torchvision finds a net's weights by this annotation, and accepts only its own enums there.
    signature = inspect.signature(build)
    weights = signature.parameters["weights"].replace(annotation=models.AlexNet_Weights | None)
    parameters = [weights if name == "weights" else own for name, own in signature.parameters.items()]
    build.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    builders = {NAME: build}
    for variant in VARIANTS:
        builders[f"{NAME}_{variant}"] = made = update_wrapper(partial(build, variant=variant), build)
        made.__signature__ = build.__signature__  # type: ignore[attr-defined]
    for name, builder in builders.items():
        if name not in models.list_models():
            models._api.register_model(name)(builder)


class _AfterImport:
    """Finds ``torchvision.models`` as others do, and registers the nets once it is there."""

    def __init__(self, build: Callable[..., Any]) -> None:
        self.build = build

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != MODELS or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register(self.build, module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def register_with_torchvision(build: Callable[..., Any]) -> None:
    """Now if torchvision is imported, else when it will be."""
    if MODELS in sys.modules:
        register(build, sys.modules[MODELS])
    else:
        sys.meta_path.insert(0, _AfterImport(build))  # type: ignore[arg-type]
