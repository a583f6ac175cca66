"""Every runtime gives PyTorch's numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from convscale.artifact.artifact import Artifact
from convscale.errors import UserError
from convscale.runtimes.base import Opening, installed_runtimes, open_runtime
from convscale.runtimes.pytorch import runner as torch_runner
from convscale.runtimes.pytorch.runner import TorchRunner, torch_threads


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", "openvino"])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_same_numbers(runtime: str, n: int, tiny: nn.Module, onnx_art: Artifact) -> None:
    x = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n))
    run = open_runtime(tiny if runtime == "eager" else onnx_art.model_path, runtime, Opening(threads=1))
    assert run.threads == 1
    (logits,) = run(x)
    with torch.no_grad():
        assert np.allclose(logits, tiny(x).numpy(), atol=1e-5)
    assert np.array_equal(run(x.numpy())[0], logits)


def test_outputs_survive_the_next_call(onnx_art: Artifact) -> None:
    run = open_runtime(onnx_art.model_path, "openvino", Opening(threads=1))
    (first,) = run(torch.zeros(1, 3, 32, 32))
    kept = first.copy()
    run(torch.ones(1, 3, 32, 32))
    assert np.array_equal(first, kept)


@pytest.mark.parametrize("runtime", ["compiled", "compiled-frozen"])
def test_compiled(runtime: str) -> None:
    if "compiled" not in installed_runtimes():
        pytest.skip("no C++ compiler")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x).numpy()
        assert np.allclose(open_runtime(net, runtime, Opening(threads=1))(x)[0], expected, atol=1e-5)


def test_the_most_that_a_compiler_does_is_asked_for_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels timed against each other in one CUDA graph, whose outputs the next call writes over: each call says that
    the one before is done with. Stand-ins for the compiler; there is no GPU here.
    """
    told: list[dict[str, object]] = []
    marks: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda net, **given: told.append(given) or net)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(len(marks)))
    monkeypatch.setattr(torch_runner, "installed_runtimes", lambda: ("compiled",))
    net, x = nn.Conv2d(3, 4, 3).eval(), torch.rand(2, 3, 8, 8)
    run = TorchRunner(net, "compiled-max", Opening(threads=1))
    with torch.no_grad():
        assert np.array_equal(run(x)[0], net(x).numpy())
    run(x)
    assert told == [{"dynamic": False, "mode": "max-autotune"}]
    assert marks == [0, 1]
    TorchRunner(net, "compiled", Opening(threads=1))(x)
    assert told[1:] == [{"dynamic": None}]
    assert marks == [0, 1]
    with pytest.raises(UserError, match="runtime compiled-max runs on device cuda here, got 'cpu'"):
        open_runtime(net, "compiled-max", Opening())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[object]]]:
    """The images' batch sizes of every graph that is compiled; no code is generated."""
    found: list[list[object]] = []
    real = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        found.append([x.shape[0] if isinstance(x, torch.Tensor) else x for x in inputs if getattr(x, "ndim", 4) == 4])
        return graph.forward

    def compile(net: nn.Module, *, options: object = None, mode: object = None, **given: object) -> object:
        return real(net, backend=backend, **given)  # type: ignore[call-overload]

    monkeypatch.setattr(torch, "compile", compile)
    yield found
    torch._dynamo.reset()


class Pooled(nn.Module):
    """Without weights of four dimensions, so that a graph's only map is its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu().mean((2, 3))


class Two(Pooled):
    """Another network, with code of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x.relu().mean((2, 3))


def test_what_is_timed_is_compiled_for_its_own_shape(graphs: list[list[object]]) -> None:
    """PyTorch's own way is one graph for all sizes from the second on, and none beyond eight."""
    if "compiled" not in installed_runtimes():
        pytest.skip("no C++ compiler")
    sizes = list(range(2, 14))
    for _ in range(2):  # a second runner of the same network takes nothing from the first
        run = open_runtime(Pooled(), "compiled", Opening(threads=1, static=True))
        for size in (*sizes, *sizes):
            run(torch.zeros(size, 3, 4, 4))
    assert graphs == [[size] for size in sizes] * 2
    graphs.clear()
    torch._dynamo.reset()
    run = open_runtime(Pooled(), "compiled", Opening(threads=1))
    for size in sizes:
        run(torch.zeros(size, 3, 4, 4))
    assert len(graphs) == 2, "an artefact that is served takes batches of any size"


def test_a_graph_of_one_shape_leaves_what_others_compiled(
    graphs: list[list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``compiled-max`` has code for each shape, as a timing has, but others in the process keep theirs."""
    monkeypatch.setattr(torch_runner, "installed_runtimes", lambda: ("compiled",))
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    other = TorchRunner(Pooled(), "compiled", Opening(threads=1))
    other(torch.zeros(3, 3, 5, 5))
    assert graphs == [[3]]
    run = TorchRunner(Two(), "compiled-max", Opening(threads=1))
    sizes = list(range(2, 14))
    for size in (*sizes, *sizes):
        run(torch.zeros(size, 3, 4, 4))
    other(torch.zeros(3, 3, 5, 5))
    assert graphs == [[3], *([size] for size in sizes)]
    assert torch._dynamo.config.recompile_limit == limit < len(sizes)


def test_nhwc_and_bf16(tiny: nn.Module) -> None:
    import copy

    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = tiny(x).numpy()
    for precision, layout, tolerance in (("fp32", "nhwc", 1e-5), ("bf16", "nchw", 0.05), ("amp", "nhwc", 0.05)):
        (logits,) = TorchRunner(copy.deepcopy(tiny), "eager", Opening(threads=1, precision=precision, layout=layout))(x)
        error = np.abs(logits - expected).max() / np.abs(expected).max()
        assert error < tolerance
        assert (error > 1e-5) == (precision != "fp32")


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_bad_input(tiny: nn.Module, onnx_art: Artifact) -> None:
    with pytest.raises(UserError, match="runtime 'onnx' is unknown"):
        open_runtime(onnx_art.model_path, "onnx")
    with pytest.raises(UserError, match="opens model files, not modules"):
        open_runtime(tiny, "openvino")
    with pytest.raises(UserError, match=r"opens modules, not model\.onnx"):
        open_runtime(onnx_art.model_path, "eager")
    with pytest.raises(UserError, match="int8 needs a quantised artefact"):
        open_runtime(tiny, "eager", Opening(precision="int8"))
    with pytest.raises(UserError, match=r"ONNX Runtime can not open classes\.json"):
        open_runtime(onnx_art.folder / "classes.json", "onnxruntime")
    with pytest.raises(UserError, match=r"OpenVINO can not open classes\.json"):
        open_runtime(onnx_art.folder / "classes.json", "openvino")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tiny: nn.Module, onnx_art: Artifact) -> None:
    with pytest.raises(UserError, match="torch sees no CUDA GPU"):
        open_runtime(tiny, "eager", Opening(device="cuda"))
    with pytest.raises(UserError, match=r"no CUDAExecutionProvider; pip install onnxruntime-gpu"):
        open_runtime(onnx_art.model_path, "onnxruntime", Opening(device="cuda"))


def test_a_gpu_that_does_not_start_is_no_gpu(onnx_art: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    class Fallen(ort.InferenceSession):
        """A session as ONNX Runtime gives it where the provider's libraries do not load: on the processor."""

        def __init__(self, path: str, options: ort.SessionOptions, providers: list[object]) -> None:
            assert providers == [("CUDAExecutionProvider", {"device_id": 0})]
            super().__init__(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Fallen)
    with pytest.raises(UserError, match="CUDAExecutionProvider does not start here"):
        open_runtime(onnx_art.model_path, "onnxruntime", Opening(device="cuda"))
