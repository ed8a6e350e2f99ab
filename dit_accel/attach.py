"""Every diffusers pipeline gets the method ``set_attn_processor``, whichever package is imported first.

diffusers takes seconds to import, so it is not imported here: if it is not there yet, a finder waits for the module
that defines its pipelines, and leaves once that is loaded.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "diffusers.pipelines.pipeline_utils"


def attach() -> None:
    """Add the method now, or as soon as diffusers' pipelines are loaded."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _add_method(module)
    elif not any(isinstance(finder, _WhenLoaded) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenLoaded())


def set_attn_processor(self: Any, processor: Any) -> None:
    """Run this pipeline's attention by a dit_accel method: its name, a processor, a tuned plan, or None to restore."""
    from dit_accel import plugin

    plugin.set_attn_processor(self, processor)


def _add_method(module: ModuleType) -> None:
    module.DiffusionPipeline.set_attn_processor = set_attn_processor


class _WhenLoaded(MetaPathFinder):
    """Finds nothing by itself; wraps the loader of one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_attach(module: ModuleType) -> None:
            load(module)
            _add_method(module)

        spec.loader.exec_module = load_and_attach  # type: ignore[method-assign]
        return spec
