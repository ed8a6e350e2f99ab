"""The Hopper kernels compile for their GPU on any machine: they fit the installed Triton and the GPU's registers.

They cannot be interpreted, so this and a run on the GPU are their tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit_accel.kernels.block_sparse.gluon_forward import TRITONS

triton = pytest.importorskip("triton", reason="Triton compiles the kernels")

HELPER = Path(__file__).with_name("gluon_compile.py")
MAX_SHARED = 227 * 1024  # bytes that a CTA of a Hopper GPU can have
# Bytes that may spill. Loops over whole tiles are free of spills where the bound is small; the others spill in masks.
MAX_SPILLED = {
    "16-bit raster": 64,
    "16-bit everything": 1200,
    "16-bit disc": 400,
    "fp8 raster": 16,
    "fp8 boxes, head dim 64": 64,
    "fp8 everything": 2400,
    "int8 raster": 1200,
}


@pytest.fixture(scope="module")
def assembled() -> dict[str, dict[str, int]]:
    """What ptxas says of each kernel. In a process of its own: here Triton may have been told to interpret."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    # With any other release `needs` refuses the backend, so no user meets the kernels.
    if not TRITONS[0] <= version <= TRITONS[1]:
        pytest.skip(f"the kernels are not offered with triton {triton.__version__}")
    run = subprocess.run(
        [sys.executable, str(HELPER)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, dict[str, int]] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", MAX_SPILLED)
def test_registers_and_shared_memory_suffice(assembled: dict[str, dict[str, int]], name: str) -> None:
    assert assembled[name]["spilled"] <= MAX_SPILLED[name]
    assert assembled[name]["shared"] <= MAX_SHARED
    assert assembled[name]["registers"] <= 168


@pytest.mark.parametrize("name", MAX_SPILLED)
def test_matrix_products_stay_asynchronous(assembled: dict[str, dict[str, int]], name: str) -> None:
    assert not assembled[name]["serialised"]
