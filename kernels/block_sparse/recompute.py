"""Gradients of a backend of plain torch code: its forward once more, under autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    def run(q: Tensor, k: Tensor, v: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor | None]:
        keys = pooled and PooledKeys(rows[0], rows[1], pooled.log_weights)
        return forward(replace(inputs, q=q, k=k, v=v, pooled=keys, with_lse=grad_lse is not None))

    rows = (inputs.q, inputs.k, inputs.v) if pooled is None else (inputs.q, inputs.k, inputs.v, pooled.k, pooled.v)
    return Gradients(*differentiated(run, rows, (grad_out, grad_lse)))


def differentiated(
    run: Callable[..., tuple[Tensor | None, ...]], rows: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Gradients at each of ``rows`` of ``run(*rows)``, given those of its results; for use inside an operator."""
    with _autograd():
        leaves = [x.detach().requires_grad_() for x in rows]
        pairs = [(x, g) for x, g in zip(run(*leaves), gradients, strict=True) if x is not None and g is not None]
        pairs = [(x, g) for x, g in pairs if x.requires_grad]
        if not pairs:  # empty lists: the results are constants
            return [torch.zeros_like(x) for x in leaves]
        results, given = zip(*pairs, strict=True)
        return torch.autograd.grad(results, leaves, given, allow_unused=True, materialize_grads=True)


@contextmanager
def _autograd() -> Iterator[None]:
    """Autograd inside an operator."""
    with ExitStack() as stack:
        for key in _RECORDING:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield
