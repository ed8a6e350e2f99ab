"""Compiles the Hopper kernels to machine code without a GPU, and reads what the assembler says about them.

As a script it prints that of each of ``KERNELS`` as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from dit_accel.kernels.block_sparse.gluon_eight_bit import eight_bit_forward
from dit_accel.kernels.block_sparse.gluon_forward import half_of
from dit_accel.kernels.block_sparse.gluon_kernel import block_sparse_forward
from dit_accel.kernels.block_sparse.gluon_tools import Spec

POINTERS = {
    **dict.fromkeys(("lse", "log_weights"), "*fp32"),
    **dict.fromkeys(("counts", "partial", "indices", "text_lengths", "bounds", "queue"), "*i32"),
}
FLOATS = ("scale", "per_frame", "per_row")


class Assembled(NamedTuple):
    """What ptxas made of a kernel.

    Args:
        registers: per thread.
        spilled: bytes stored to local memory, over the whole text of the kernel.
        serialised: whether it gave up on asynchronous matrix products.
        shared: bytes of shared memory.
        ptx: the kernel's text.
    """

    registers: int
    spilled: int
    serialised: bool
    shared: int
    ptx: str


def spec(tile: tuple[int, int, int], dim: int = 128, flat: bool = False, **features: bool) -> Spec:
    names = ("ragged", "window", "union", "dilated", "disc", "text", "text_lengths", "pooled")
    options: dict[str, Any] = {name: features.get(name, False) for name in names}
    return Spec(
        tile=tile,
        half=half_of(tile)[0],
        flat=flat,
        dim=dim,
        hold_queries=dim == 64,
        heads_inside=features.get("heads_inside", True),
        **options,
    )


def sixteen_bit(wanted: Spec, dtype: str = "bf16") -> Assembled:
    keys, queries = _boxes(wanted, wanted.tile), _boxes(wanted, half_of(wanted.tile)[1])
    types = {
        **dict.fromkeys(("q_desc", "out_desc"), _descriptor(dtype, queries)),
        **dict.fromkeys(("k_desc", "v_desc"), _descriptor(dtype, keys)),
        **dict.fromkeys(("text_q", "text_out"), _descriptor(dtype, [1, 64, 64]) if wanted.text else None),
        **dict.fromkeys(("text_k", "text_v"), _descriptor(dtype, [1, 128, 64]) if wanted.text else None),
        **dict.fromkeys(("pooled_k", "pooled_v"), _descriptor(dtype, [1, 128, 64]) if wanted.pooled else None),
    }
    return _assemble(block_sparse_forward, wanted, types)


def eight_bit(wanted: Spec, kind: str = "fp8e4nv", dtype: str = "bf16") -> Assembled:
    dim = wanted.dim
    types = {
        "q_desc": _descriptor(kind, [64, dim], dim, 8),
        "k_desc": _descriptor(kind, [128, dim], dim, 8),
        "v_desc": _descriptor("fp8e4nv", [dim, 128], 128, 8),
        **dict.fromkeys(("q_scale_desc", "scale_desc"), _descriptor("fp32", [1, 32], 0, 32)),
        "out_desc": _descriptor(dtype, _boxes(wanted, half_of(wanted.tile)[1])),
        "text_out": _descriptor(dtype, [1, 64, 64]) if wanted.text else None,
    }
    return _assemble(eight_bit_forward, wanted, types)


def _boxes(wanted: Spec, box: tuple[int, int, int]) -> list[int]:
    return [1, box[2], 64] if wanted.flat else [1, *box, 64]


def _descriptor(dtype: str, box: list[int], swizzle: int = 128, bits: int = 16) -> str:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=len(box))
    return f"tensordesc<{dtype}[{', '.join(map(str, box))}],{layout!r}>"


def _assemble(kernel: Any, wanted: Spec, descriptors: dict[str, str | None]) -> Assembled:
    names = kernel.arg_names
    signature, constants = {}, {}
    for place, name in enumerate(names):
        known = descriptors.get(name) or POINTERS.get(name) or ("fp32" if name in FLOATS else "i32")
        if name == "S" or (name in descriptors and descriptors[name] is None):
            known = "constexpr"
            constants[(place,)] = wanted if name == "S" else None
        signature[name] = known
    aligned = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].startswith("*")
    }
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "maxnreg": 168}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(text), "-o", str(text.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", said))
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", said))
    serialised = "serializ" in said or "C75" in said
    return Assembled(registers, spilled, serialised, compiled.metadata.shared, compiled.asm["ptx"])


EVERYTHING = {"ragged": True, "window": True, "text": True, "text_lengths": True, "pooled": True}
KERNELS: dict[str, Callable[[], Assembled]] = {
    "16-bit raster": lambda: sixteen_bit(spec((1, 1, 128), flat=True)),
    "16-bit everything": lambda: sixteen_bit(spec((4, 4, 8), **EVERYTHING)),
    "16-bit disc": lambda: sixteen_bit(spec((1, 8, 16), ragged=True, window=True, disc=True, text=True)),
    "fp8 raster": lambda: eight_bit(spec((1, 1, 128), flat=True)),
    "fp8 boxes, head dim 64": lambda: eight_bit(spec((4, 4, 8), dim=64, ragged=True)),
    "fp8 everything": lambda: eight_bit(spec((4, 4, 8), **EVERYTHING)),
    "int8 raster": lambda: eight_bit(spec((1, 1, 128), flat=True), kind="i8"),
}

if __name__ == "__main__":
    print(json.dumps({name: dict(make()._asdict(), ptx=None) for name, make in KERNELS.items()}))
