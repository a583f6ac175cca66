"""The kernels compiled ahead of time for three generations of cards: nothing spills, and memory is moved 16 bytes at a
time.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
CARDS = (80, 90, 120)
POINTERS = {
    "statistics_rows": (["x"], ["shift_ptr", "part_ptr"], ["M", "C", "ROWS"]),
    "normalise_rows": (["x", "y"], ["mean_ptr", "scale_ptr", "bias_ptr"], ["M", "C"]),
    "sums_rows": (["y", "dy"], ["bias_ptr", "inverse_ptr", "part_ptr"], ["M", "C", "ROWS"]),
    "gradient_rows": (
        ["y", "dy", "dx"],
        ["bias_ptr", "inverse_ptr", "scale_ptr", "mean0_ptr", "mean1_ptr"],
        ["M", "C"],
    ),
    "statistics_planes": (["x"], ["shift_ptr", "part_ptr"], ["N", "C", "HW", "IMAGES"]),
    "normalise_planes": (["x", "y"], ["mean_ptr", "scale_ptr", "bias_ptr"], ["C", "HW"]),
    "sums_planes": (["y", "dy"], ["bias_ptr", "inverse_ptr", "part_ptr"], ["N", "C", "HW", "IMAGES"]),
    "gradient_planes": (
        ["y", "dy", "dx"],
        ["bias_ptr", "inverse_ptr", "scale_ptr", "mean0_ptr", "mean1_ptr"],
        ["C", "HW"],
    ),
    "finish_statistics": ([], ["part_ptr", "shift_ptr", "mean_ptr", "var_ptr"], ["SLICES", "M", "C"]),
    "finish_sums": ([], ["part_ptr", "sum0_ptr", "sum1_ptr", "mean0_ptr", "mean1_ptr"], ["SLICES", "M", "C"]),
    "blur_rows": (["x", "y"], [], ["M", "C", "H", "W", "OH", "OW"]),
    "blur_gradient_rows": (["dy", "dx"], [], ["M", "C", "H", "W", "OH", "OW"]),
}
"""Of each kernel its maps, its vectors in float32, its sizes."""
BYTES_PER_ELEMENT = {"statistics_rows": 2, "normalise_rows": 4, "sums_rows": 4, "gradient_rows": 6}
"""In half precision, by the loads and stores of maps: 6 forward, 10 backward."""


def compiled(name: str, card: int) -> Any:
    """A kernel for a card, for bfloat16 maps whose addresses and sizes are multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from convscale.nn.kernels import blur_triton, norm_triton

    blurs = name.startswith("blur")
    kernel = getattr(blur_triton if blurs else norm_triton, name)
    maps, vectors, sizes = POINTERS[name]
    signature = (
        {f"{each}_ptr": "*bf16" for each in maps} | dict.fromkeys(vectors, "*fp32") | dict.fromkeys(sizes, "i32")
    )
    constants: dict[str, Any] = {"BM": 32, "BC": 64} if name.endswith("rows") else {"BP": 2048}
    if name.startswith("finish"):
        constants = {"BS": 64, "BC": 16} | ({"USE_BATCH": True} if "sums" in name else {})
    elif blurs:
        constants |= {"STRIDE": 2} | ({"OUTPUTS": 2} if "gradient" in name else {})
    elif "statistics" not in name:
        constants |= {"SLOPE": 1e-3, "ACT": True}
    if name.startswith(("sums", "gradient")):
        constants["INV_SLOPE"] = 1e3
    names = [each.name for each in kernel.params]
    assert set(names) == {*signature, *constants}, "the kernel's arguments"
    aligned = {(names.index(each),): [["tt.divisibility", 16]] for each in signature}
    source = ASTSource(kernel, {n: signature.get(n, "constexpr") for n in names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": 4})


def registers(ptx: str, card: int, folder: Path) -> tuple[int, int]:
    """Registers of a thread and bytes that spill, as the assembler says."""
    from triton.knobs import nvidia

    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = (nvidia.ptxas_blackwell if card >= 100 else nvidia.ptxas).path
    done = subprocess.run(
        [assembler, "-v", f"--gpu-name=sm_{card}{'a' if card >= 90 else ''}", str(source), "-o", str(folder / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    said = done.stdout + done.stderr
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return int(re.findall(r"Used (\d+) registers", said)[0]), spilled


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", POINTERS)
def test_nothing_spills_and_memory_moves_16_bytes_at_a_time(name: str, card: int, tmp_path: Path) -> None:
    ptx = compiled(name, card).asm["ptx"]
    used, spilled = registers(ptx, card, tmp_path)
    assert spilled == 0
    assert used <= 128
    wide = re.compile(r"(ld|st)\.global[\w.:]*\.v4\.b32")
    maps, _, _ = POINTERS[name]
    loads = sum(match[1] == "ld" for match in wide.finditer(ptx))
    stores = sum(match[1] == "st" for match in wide.finditer(ptx))
    read = [each for each in maps if each in ("x", "dy") or (each == "y" and name.startswith(("sums", "gradient")))]
    assert loads >= len(read), "every map is read 16 bytes at a time"
    assert stores >= len(maps) - len(read), "every map is written 16 bytes at a time"


def test_bytes_of_an_element() -> None:
    for name, expected in BYTES_PER_ELEMENT.items():
        maps, _, _ = POINTERS[name]
        assert 2 * len(maps) == expected
    assert BYTES_PER_ELEMENT["statistics_rows"] + BYTES_PER_ELEMENT["normalise_rows"] == 6
    assert BYTES_PER_ELEMENT["sums_rows"] + BYTES_PER_ELEMENT["gradient_rows"] == 10
