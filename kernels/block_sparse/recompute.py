"""Gradients of a backend of plain torch code: its forward once more, under autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse.inputs import Gradients, Inputs
from dit_accel.kernels.block_sparse.plan import PooledKeys

# What a dispatch mode excludes while an operator runs: recording, and in-place writes through views.
_RECORDING = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)

Forward = Callable[[Inputs], tuple[Tensor, Tensor | None]]


def recomputed(forward: Forward, inputs: Inputs, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Gradients of ``forward`` at ``inputs``."""
    pooled = inputs.pooled
    rows = (inputs.q, inputs.k, inputs.v) if pooled is None else (inputs.q, inputs.k, inputs.v, pooled.k, pooled.v)
    with _autograd():
        q, k, v, *pooled_rows = leaves = [x.detach().requires_grad_() for x in rows]
        pooled = pooled and PooledKeys(pooled_rows[0], pooled_rows[1], pooled.log_weights)
        out, lse = forward(replace(inputs, q=q, k=k, v=v, pooled=pooled, with_lse=grad_lse is not None))
        pairs = [(out, grad_out), (lse, grad_lse)]
        pairs = [(x, g) for x, g in pairs if x is not None and g is not None and x.requires_grad]
        if not pairs:  # empty lists: the results are constants
            return Gradients(*map(torch.zeros_like, leaves))
        results, gradients = zip(*pairs, strict=True)
        return Gradients(*torch.autograd.grad(results, leaves, gradients, allow_unused=True, materialize_grads=True))


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator."""
    with ExitStack() as stack:
        for key in _RECORDING:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield
