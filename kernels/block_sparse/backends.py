"""The table of backends, and which of them runs a call.

A backend is a module with ``needs(inputs) -> str | None``, the one clause that says why it cannot run these inputs, and
``forward(inputs) -> (out, lse or None)``. A module of gradients has ``needs`` likewise and
``backward(inputs, out, lse, grad_out, grad_lse or None) -> Gradients``. Modules are imported when first considered.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Literal, NamedTuple

from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Gradients, Inputs
from dit_accel.kernels.block_sparse.recompute import recomputed

Backend = Literal["auto", "reference", "torch", "triton", "gluon", "flex", "fa4", "xformers"]

_LOG = logging.getLogger(__name__)
_HOME = "dit_accel.kernels.block_sparse"


class Entry(NamedTuple):
    module: str
    package: str  # what has to be installed
    backward: str | None = None  # the module of its gradients; its own where autograd differentiates the forward


TABLE: dict[str, Entry] = {
    "reference": Entry("reference", "torch", "reference"),
    "torch": Entry("gather", "torch", "gather"),
    "triton": Entry("triton_forward", "triton", "triton_backward"),
    "gluon": Entry("gluon_forward", "triton", "triton_backward"),
    "flex": Entry("flex", "torch", "flex"),
    "fa4": Entry("fa4", "flash_attn"),
    "xformers": Entry("xformers", "xformers"),
}
BACKENDS = tuple(TABLE)
PREFERRED = ("gluon", "triton", "torch")  # what "auto" tries, the fastest first


def load(backend: str) -> ModuleType:
    return _module(TABLE[backend].module)


def gradients(
    backend: str, inputs: Inputs, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """Gradients at ``inputs`` from what the forward returned and the gradients of both."""
    entry = TABLE[backend]
    if entry.backward == entry.module:
        return recomputed(load(backend).forward, inputs, grad_out, grad_lse)
    assert entry.backward is not None, "refused before"
    found: Gradients = _module(entry.backward).backward(inputs, out, lse, grad_out, grad_lse)
    return found


def missing(backend: str, inputs: Inputs) -> str | None:
    """What ``backend`` lacks to run these inputs, one clause; None if nothing."""
    package = TABLE[backend].package
    if importlib.util.find_spec(package) is None:
        return f"the package {package}, which is not installed"
    clause: str | None = load(backend).needs(inputs)
    if clause or not inputs.gradients:
        return clause
    backward = TABLE[backend].backward
    if backward is None:
        return "inputs without gradients, it has no backward"
    if inputs.precision != "native":
        return f"precision='native' for gradients, got {inputs.precision!r}"
    clause = _module(backward).needs(inputs)
    return clause


def resolve(backend: str, inputs: Inputs) -> str:
    """The backend that runs these inputs, ``backend`` itself unless it is "auto"; a ValueError if it cannot."""
    if backend == "auto":
        return choose(inputs)
    check(backend, inputs)
    return backend


def choose(inputs: Inputs) -> str:
    """The first preferred backend that can run these inputs; off a GPU, where Triton only interprets, plain torch."""
    for backend in PREFERRED if inputs.q.is_cuda else PREFERRED[-1:]:
        if missing(backend, inputs) is None:
            _notice(backend, inputs.q.device.type)
            return backend
    raise ValueError(
        f"no backend runs precision={inputs.precision!r} here: 'gluon' needs {missing('gluon', inputs)}; "
        "use precision='native'."
    )


def check(backend: str, inputs: Inputs) -> None:
    """Raise a ValueError that says why ``backend`` cannot run these inputs, if it cannot."""
    if backend not in TABLE:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
    clause = missing(backend, inputs)
    if clause:
        raise ValueError(f"backend={backend!r} needs {clause}; use backend='auto'.")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{_HOME}.{name}")


@functools.cache
def _notice(backend: str, device: str) -> None:
    _LOG.info("block-sparse attention runs on the %s backend (%s tensors).", backend, device)
