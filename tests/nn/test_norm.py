"""InPlaceABN and BatchNormAct against torch's own BatchNorm2d, followed by torch's own activation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from convscale import UserError
from convscale.nn.kernels.norm import divisor
from convscale.nn.norm import BatchNormAct, InPlaceABN, convert_norm, convert_sync, norm_act

SHAPE = (4, 6, 7, 5)
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(a: Tensor, b: Tensor) -> float:
    """DESIGN's relative error: max|a - b| / max|b|."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def torch_norm(norm: nn.Module, activation: str, slope: float) -> nn.Module:
    """torch's BatchNorm2d with the same state, and torch's activation."""
    twin = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum).to(norm.weight.dtype)
    twin.load_state_dict(norm.state_dict())
    twin.train(norm.training)
    return nn.Sequential(twin, nn.LeakyReLU(slope) if activation == "leaky_relu" else nn.Identity())


def randomised(norm: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Signed weights of |w| from 0.3 to 1.3, biases and running statistics away from their defaults."""
    channels = norm.num_features
    with torch.no_grad():
        norm.weight.copy_((seeded(channels, seed=1).abs() + 0.3).clamp_max(1.3) * seeded(channels, seed=2).sign())
        norm.bias.copy_(seeded(channels, seed=3))
        norm.running_mean.copy_(seeded(channels, seed=4))
        norm.running_var.copy_(seeded(channels, seed=5).abs() + 0.5)
    return norm.to(dtype)


def gradients(norm: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and the gradients for x, weight and bias."""
    x = x.clone().requires_grad_()
    norm.zero_grad()
    y = norm(x * 1)  # not a leaf, and nobody else's
    y.backward(dy)
    first = norm[0] if isinstance(norm, nn.Sequential) else norm
    return y.detach(), x.grad, first.weight.grad.clone(), first.bias.grad.clone()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("activation", "slope"), [("identity", 0.01), ("leaky_relu", 0.01), ("leaky_relu", 1e-3), ("leaky_relu", 0.3)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inplace_equals_torch_batch_norm(
    training: bool, activation: str, slope: float, layout: torch.memory_format
) -> None:
    norm = randomised(InPlaceABN(6, 1e-3, 0.2, activation, slope)).train(training)
    twin = torch_norm(norm, activation, slope)
    x = (seeded(*SHAPE, seed=6) * 2 + 1).contiguous(memory_format=layout)
    dy = seeded(*SHAPE, seed=7).contiguous(memory_format=layout)
    ours, theirs = gradients(norm, x, dy), gradients(twin, x, dy)
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 1e-5
    for key in KEYS:
        assert torch.equal(getattr(norm, key), getattr(twin[0], key)), key
    assert ours[0].is_contiguous(memory_format=layout)
    assert ours[1].is_contiguous(memory_format=layout)
    assert norm.num_batches_tracked.item() == int(training)


@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-2])
@pytest.mark.parametrize("training", [True, False])
def test_inplace_is_accurate_down_to_a_weight_of_a_hundredth(scale: float, training: bool) -> None:
    """Against BatchNorm in float64, with a bias of the order of the output, which is what inversion loses digits to."""
    norm = InPlaceABN(6, activation="leaky_relu", slope=1e-2)
    with torch.no_grad():
        norm.weight.copy_(scale * torch.tensor([1, -1, 1, -1, 1, -1]))
        norm.bias.copy_(seeded(6, seed=3).clamp(-1, 1) * scale)
    norm.train(training)
    twin = torch_norm(copy.deepcopy(norm).double(), "leaky_relu", 1e-2)
    x, dy = seeded(8, 6, 9, 9, seed=6), seeded(8, 6, 9, 9, seed=7)
    for a, b in zip(gradients(norm, x, dy), gradients(twin, x.double(), dy.double()), strict=True):
        assert relative(a, b) < 1e-5


def test_the_divisors_rule() -> None:
    """DESIGN: sign(w) * max(|w|, 1e-3), 1e-2 in half precision."""
    weight = torch.tensor([-1.0, -0.005, -1e-4, 0.0, 1e-4, 0.005, 0.5])
    assert torch.equal(divisor(weight, torch.float32), torch.tensor([-1.0, -0.005, -1e-3, 1e-3, 1e-3, 0.005, 0.5]))
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(divisor(weight, dtype), torch.tensor([-1.0, -1e-2, -1e-2, 1e-2, 1e-2, 1e-2, 0.5]))


WEIGHTS = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0]


def at_weight(norm: nn.Module, weight: float, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Our gradients with maps of `dtype`, and BatchNorm's in float64 from the same (rounded) maps; half the channels
    negative.
    """
    with torch.no_grad():
        norm.weight.copy_(weight * torch.tensor([1.0, -1.0] * 3))
        norm.bias.copy_(seeded(6, seed=3))
    x, dy = seeded(8, 6, 12, 12, seed=6, dtype=dtype), seeded(8, 6, 12, 12, seed=7, dtype=dtype)
    dy = dy + 0.5 * x  # so that the weight's gradient isn't noise around 0
    twin = torch_norm(copy.deepcopy(norm).double(), norm.activation, norm.slope)
    return gradients(norm, x, dy), gradients(twin, x.double(), dy.double())


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_keeping_the_input_is_exact_at_every_weight(weight: float, dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = at_weight(InPlaceABN(6, keep="input"), weight, dtype)
    assert ours[0].dtype == dtype
    assert (
        relative(ours[2], theirs[2]) < tolerance
    )  # the weight's gradient: what moves it away from 0 at the first step
    assert theirs[2].abs().min() > 100
    assert relative(ours[3], theirs[3]) < tolerance
    if weight:
        smallest_step = 6e-8 if dtype == torch.float16 else 0.0
        assert (ours[1].double() - theirs[1]).abs().max() < tolerance * theirs[1].abs().max() + smallest_step
    else:
        assert ours[1].abs().max() == 0


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("dtype", "smallest", "tolerance"), [(torch.float32, 1e-3, 1e-4), (torch.bfloat16, 1e-2, 2e-2)]
)
def test_keeping_the_output_stays_bounded_as_the_weight_vanishes(
    weight: float, dtype: torch.dtype, smallest: float, tolerance: float
) -> None:
    ours, theirs = at_weight(InPlaceABN(6, activation="leaky_relu", slope=1e-2), weight, dtype)
    assert relative(ours[3], theirs[3]) < tolerance  # the bias's needs no inversion
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        # Never larger than the true one by more than rounding of the output over the smallest scale explains, on
        # whatever side.
        assert a.abs().max() <= 1.5 * b.abs().max() + 1e-6
    if weight >= 10 * smallest:
        assert relative(ours[1], theirs[1]) < (1e-5 if dtype == torch.float32 else 0.1)
        assert relative(ours[2], theirs[2]) < (1e-5 if dtype == torch.float32 else 0.1)
    # Below the smallest scale the normalised input comes out short by |w| / smallest, and the weight's gradient with
    # it: the stated rule.
    shortfall = min(weight / smallest, 1.0)
    if dtype == torch.float32:
        assert relative(ours[2], theirs[2] * shortfall) < 1e-3 or weight <= 1e-6
        assert (ours[2] - theirs[2] * shortfall).abs().max() < 0.02 * theirs[2].abs().max()


def test_a_naive_division_would_fail_where_ours_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case of the issue: bfloat16, |w| = 1e-6. Without the floor the gradient is thousands of times off; so this
    file's bounds can fail.
    """
    monkeypatch.setattr("convscale.nn.norm_ops.divisor", lambda weight, map_dtype: weight)
    ours, theirs = at_weight(InPlaceABN(6), 1e-6, torch.bfloat16)
    assert ours[1].abs().max() > 1000 * theirs[1].abs().max()


def test_zero_initialised_block_leaves_zero_at_the_first_step() -> None:
    """conv -> norm(w=0, keep input) -> + x -> ReLU: the step that BatchNorm takes."""
    nets = []
    for kind in ("inplace", "batchnorm"):
        torch.manual_seed(0)
        conv, norm = nn.Conv2d(6, 6, 3, padding=1), norm_act(kind, 6, keep="input")
        nn.init.zeros_(norm.weight)
        x = seeded(*SHAPE, seed=6)
        (F.relu_(norm(conv(x)).add_(x)) * seeded(*SHAPE, seed=7)).sum().backward()
        nets.append((norm.weight.grad, norm.bias.grad, conv.weight.grad))
    for ours, theirs in zip(*nets, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert nets[0][0].abs().min() > 1e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("keep", "activation"), [("output", "identity"), ("output", "leaky_relu"), ("input", "identity")]
)
def test_gradcheck(training: bool, keep: str, activation: str) -> None:
    norm = randomised(InPlaceABN(3, activation=activation, slope=0.1, keep=keep), torch.float64).train(training)
    x = seeded(2, 3, 3, 2, seed=6, dtype=torch.float64).requires_grad_()
    weight, bias = norm.weight.detach().clone().requires_grad_(), norm.bias.detach().clone().requires_grad_()

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x.clone(),))

    assert torch.autograd.gradcheck(forward, (x, weight, bias))


def test_keeps_one_map() -> None:
    """Input, output and what is saved share one storage with keep="output"."""
    for keep, activation in (("output", "leaky_relu"), ("input", "identity")):
        norm = InPlaceABN(6, activation=activation, keep=keep)
        x = seeded(*SHAPE).requires_grad_() * 1
        maps = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, maps=maps: maps.append(t) or t, lambda t: t):
            y = norm(x)
        maps = [t for t in maps if t.shape == SHAPE]
        assert {t.data_ptr() for t in maps} == {(y if keep == "output" else x).data_ptr()}
        assert (y.data_ptr() == x.data_ptr()) == (keep == "output")


@pytest.mark.parametrize("momentum", [0.1, 0.37, None])
@pytest.mark.parametrize("cls", [InPlaceABN, BatchNormAct])
def test_running_statistics_are_torchs(cls: type, momentum: float | None) -> None:
    norm, twin = cls(6, momentum=momentum), nn.BatchNorm2d(6, momentum=momentum)
    for step in range(3):
        x = seeded(3, 6, 4, 4, seed=step).requires_grad_() * (step + 1)
        twin(x)
        norm(x.clone())
    for key in KEYS:
        assert torch.equal(norm.state_dict()[key], twin.state_dict()[key]), key
    norm.eval(), twin.eval()
    x = seeded(3, 6, 4, 4, seed=9)
    assert torch.allclose(norm(x.clone()), twin(x), atol=1e-6)


@pytest.mark.parametrize("cls", [InPlaceABN, BatchNormAct])
def test_without_running_statistics_the_batch_counts_in_eval_mode(cls: type) -> None:
    norm, twin = cls(6, track_running_stats=False).eval(), nn.BatchNorm2d(6, track_running_stats=False).eval()
    assert list(norm.state_dict()) == ["weight", "bias"]
    x, dy = seeded(*SHAPE) * 3 + 1, seeded(*SHAPE, seed=7)
    for a, b in zip(gradients(norm, x, dy), gradients(twin, x, dy), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("cls", [InPlaceABN, BatchNormAct])
def test_state_dict_is_batch_norms(cls: type) -> None:
    norm = cls(6)
    assert list(norm.state_dict()) == KEYS
    old = {k: v for k, v in nn.BatchNorm2d(6).state_dict().items() if k != "num_batches_tracked"}
    norm.load_state_dict(dict(old))  # official TResNet checkpoints have no counter


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("identity", lambda x: x),
        ("relu", F.relu),
        ("relu6", F.relu6),
        ("silu", F.silu),
        ("hardswish", F.hardswish),
        ("gelu", F.gelu),
        ("tanh", torch.tanh),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_act_equals_norm_then_activation(name: str, reference, training: bool) -> None:
    norm = randomised(BatchNormAct(6, activation=name)).train(training)
    twin = nn.BatchNorm2d(6)
    twin.load_state_dict(norm.state_dict())
    twin.train(training)
    x, dy = seeded(*SHAPE, seed=6) * 3, seeded(*SHAPE, seed=7)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = norm(a), reference(twin(b))
    ours.backward(dy), theirs.backward(dy)
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch.allclose(a.grad, b.grad, atol=1e-6)
    assert torch.allclose(norm.weight.grad, twin.weight.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(a.detach(), x)
    with torch.no_grad():
        assert torch.allclose(norm.eval()(x), reference(twin.eval()(x)), atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "hardswish", "mish", "gelu"])
@pytest.mark.parametrize("training", [True, False])
def test_lean_batch_norm_act_is_exact_and_keeps_one_map(name: str, training: bool) -> None:
    lean = randomised(BatchNormAct(6, activation=name, lean=True), torch.float64).train(training)
    plain = copy.deepcopy(lean)
    plain.lean = False
    x, dy = seeded(*SHAPE, seed=6, dtype=torch.float64) * 3 + 1, seeded(*SHAPE, seed=7, dtype=torch.float64)
    for a, b in zip(gradients(lean, x, dy), gradients(plain, x, dy), strict=True):
        assert relative(a, b) < 1e-13
    for key in KEYS:
        assert torch.equal(getattr(lean, key), getattr(plain, key)), key
    assert torch.autograd.gradcheck(lambda x: lean(x * 1), (x[:2, :, :2, :2].clone().requires_grad_(),))
    for norm, maps in ((lean, 1), (plain, 2)):
        kept: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.update({t.data_ptr(): t}) or t, lambda t: t
        ):
            norm(x.requires_grad_())
        assert len([t for t in kept.values() if t.shape == SHAPE]) == maps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lean_batch_norm_act_in_half_precision(dtype: torch.dtype) -> None:
    lean = randomised(BatchNormAct(6, activation="silu", lean=True))
    plain = copy.deepcopy(lean)
    plain.lean = False
    x, dy = seeded(*SHAPE, seed=6, dtype=dtype), seeded(*SHAPE, seed=7, dtype=dtype)
    for a, b in zip(gradients(lean, x, dy), gradients(plain, x, dy), strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < 0.01
    half = lean.to(dtype)
    assert {t.dtype for t in gradients(half, x, dy)} == {dtype}


# --- half precision
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [InPlaceABN, BatchNormAct])
def test_autocast(dtype: torch.dtype, training: bool, cls: type) -> None:
    """Half-precision maps through float32 parameters: output in half precision, statistics in float32, gradients near
    float64's.
    """
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3)
    norm = randomised(cls(6, activation="leaky_relu", slope=1e-2)).train(training)
    exact_conv, exact = copy.deepcopy(conv).double(), torch_norm(copy.deepcopy(norm).double(), "leaky_relu", 1e-2)
    x = seeded(4, 3, 12, 12)
    with torch.autocast("cpu", dtype):
        y = norm(conv(x))
    dy = seeded(*y.shape, seed=7)
    y.backward(dy.to(dtype))
    exact(exact_conv(x.double())).backward(dy.double())
    assert y.dtype == dtype
    assert norm.running_mean.dtype == norm.weight.grad.dtype == torch.float32
    assert torch.allclose(norm.running_var.double(), exact[0].running_var, rtol=1e-2)
    assert relative(norm.weight.grad, exact[0].weight.grad) < 0.02
    assert relative(norm.bias.grad, exact[0].bias.grad) < 0.02
    assert relative(conv.weight.grad, exact_conv.weight.grad) < 0.03


@pytest.mark.parametrize("keep", ["output", "input"])
def test_parameters_in_half_precision(keep: str) -> None:
    norm = randomised(InPlaceABN(6, keep=keep)).bfloat16()
    exact = torch_norm(copy.deepcopy(norm).double(), "identity", 0.0)
    x, dy = seeded(*SHAPE, seed=6, dtype=torch.bfloat16), seeded(*SHAPE, seed=7, dtype=torch.bfloat16)
    ours, theirs = gradients(norm, x, dy), gradients(exact, x.double(), dy.double())
    assert {t.dtype for t in ours} == {torch.bfloat16}
    for a, b in zip(ours, theirs, strict=True):
        assert relative(a, b) < 0.03
    assert torch.allclose(norm.running_mean.double(), exact[0].running_mean, atol=0.02)


# --- hazards
# --------------------------------------------------------------------------------------------------------------


def test_a_leaf_is_refused_unchanged() -> None:
    x = seeded(*SHAPE).requires_grad_()
    before = x.detach().clone()
    with pytest.raises(UserError, match=r"leaf tensor that requires grad .* pass x\.clone\(\)"):
        InPlaceABN(6)(x)
    assert torch.equal(x, before)


def test_a_view_is_refused() -> None:
    base = seeded(4, 12, 7, 5).requires_grad_() * 1
    with pytest.raises(UserError, match=r"a view \(shape \(4, 6, 7, 5\)\)"):
        InPlaceABN(6)(base[:, :6])
    with pytest.raises(UserError, match="a view"):
        InPlaceABN(6)(base.chunk(2, 1)[0])


def test_data_without_gradient_is_left_alone() -> None:
    x = seeded(*SHAPE)
    before = x.clone()
    InPlaceABN(6)(x).sum().backward()
    with torch.no_grad():
        InPlaceABN(6)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("earlier", [torch.sigmoid, lambda x: x * x], ids=["needs its output", "needs it as input"])
def test_an_input_that_another_operation_needs_is_an_error_in_backward(earlier) -> None:
    x = (
        torch.sigmoid(seeded(*SHAPE).requires_grad_())
        if earlier is torch.sigmoid
        else seeded(*SHAPE).requires_grad_() + 0
    )
    other = 0 if earlier is torch.sigmoid else earlier(x)
    y = InPlaceABN(6)(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y + other).sum().backward()


def test_an_output_that_was_overwritten_is_an_error_in_backward() -> None:
    y = InPlaceABN(6)(seeded(*SHAPE).requires_grad_() * 1)
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_is_an_error() -> None:
    norm = InPlaceABN(6)
    x = seeded(*SHAPE).requires_grad_()
    (dx,) = torch.autograd.grad(norm(x * 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()


def test_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 6, 3), InPlaceABN(6, activation="leaky_relu"), nn.Conv2d(6, 6, 3), InPlaceABN(6))
    x = seeded(*SHAPE)
    net(x).square().sum().backward()
    plain = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).square().sum().backward()
    for p, grad in zip(net.parameters(), plain, strict=True):
        assert torch.allclose(p.grad, grad, rtol=1e-5, atol=1e-6)


# --- bad arguments
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"activation": "relu"}, "inverts identity and leaky_relu .* got 'relu'"),
        ({"activation": "leaky_relu", "slope": 1e-6}, "got leaky_relu with slope 1e-06"),
        ({"activation": "leaky_relu", "slope": -0.1}, "slope -0.1"),
        ({"activation": "leekyrelu"}, "'leekyrelu' is unknown .*leaky_relu"),
        ({"keep": "both"}, "keep must be 'output' or 'input', got 'both'"),
        ({"keep": "input", "activation": "leaky_relu"}, "keep='input' needs activation 'identity'"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InPlaceABN(6, **kwargs)


@pytest.mark.parametrize("cls", [InPlaceABN, BatchNormAct])
def test_bad_inputs(cls: type) -> None:
    with pytest.raises(UserError, match=r"more than one value per channel, got shape \(1, 6, 1, 1\)"):
        cls(6)(seeded(1, 6, 1, 1))
    assert cls(6).eval()(seeded(1, 6, 1, 1)).shape == (1, 6, 1, 1)
    with pytest.raises(UserError, match=r"takes maps \(N, 6, H, W\), got shape \(4, 5, 7, 5\)"):
        cls(6)(seeded(4, 5, 7, 5))
    with pytest.raises(UserError, match=r"got shape \(4, 6\)"):
        cls(6)(seeded(4, 6))


# --- choosing and converting
# --------------------------------------------------------------------------------------------------------------


def test_norm_act_chooses() -> None:
    assert isinstance(norm_act("inplace", 6, activation="leaky_relu", slope=1e-3), InPlaceABN)
    assert isinstance(norm_act("inplace", 6, activation="leaky_relu", slope=1e-6), BatchNormAct)
    assert isinstance(norm_act("inplace", 6, activation="relu"), BatchNormAct)
    assert isinstance(norm_act("batchnorm", 6), BatchNormAct)
    assert isinstance(norm_act("inplace", 6, activation="leaky_relu", keep="input"), BatchNormAct)
    assert norm_act("inplace", 6, activation="silu").lean
    assert not norm_act("batchnorm", 6, activation="silu").lean
    norm = norm_act("inplace", 6, eps=1e-3, momentum=0.01, keep="input")
    assert (norm.eps, norm.momentum, norm.keep) == (1e-3, 0.01, "input")
    with pytest.raises(UserError, match=r"norm 'inplaced' is unknown .nearest: inplace"):
        norm_act("inplaced", 6)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    norms = [
        norm_act("batchnorm", 6, eps=1e-3, activation=a, slope=s)
        for a, s in (("leaky_relu", 1e-2), ("relu", 0.0), ("leaky_relu", 1e-6))
    ]
    last = norm_act("batchnorm", 6, momentum=0.03, keep="input")
    layers: list[nn.Module] = []
    for norm in (*norms, last):
        layers += [nn.Conv2d(6, 6, 3, padding=1), randomised(norm)]
    return nn.Sequential(*layers, nn.BatchNorm2d(6))


@pytest.mark.parametrize("training", [True, False])
def test_convert_norm_is_exact_both_ways(training: bool) -> None:
    net = small_net().train(training)
    x = seeded(*SHAPE)
    inplace = convert_norm(net, to="inplace")
    back = convert_norm(inplace, to="batchnorm")
    assert [type(m) for m in inplace][1::2] == [InPlaceABN, BatchNormAct, BatchNormAct, InPlaceABN]
    assert inplace[7].keep == "input"
    assert type(inplace[8]) is nn.BatchNorm2d
    assert [type(m) for m in back] == [type(m) for m in net]
    assert all(m.training == training for m in inplace.modules())
    assert list(inplace.state_dict()) == list(net.state_dict())
    before = copy.deepcopy(net.state_dict())
    outputs = [n(x.clone()) for n in (inplace, back, net)]
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[2])
    for (key, a), b, c in zip(
        inplace.state_dict().items(), back.state_dict().values(), net.state_dict().values(), strict=True
    ):
        assert torch.equal(a, c), key
        assert torch.equal(b, c), key
    if training:  # the copies were of their own: only net's own pass moved net's statistics, and by as much
        assert not torch.equal(before["1.running_mean"], net.state_dict()["1.running_mean"])


def test_convert_norm_leaves_the_original_and_shared_norms_shared() -> None:
    norm = BatchNormAct(6)
    net = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    converted = convert_norm(net, to="inplace")
    assert converted["a"][0] is converted["b"][0]
    assert isinstance(converted["a"][0], InPlaceABN)
    assert net["a"][0] is norm
    assert converted["a"][0].weight is not norm.weight
    assert isinstance(convert_norm(norm, to="inplace"), InPlaceABN)
    assert converted["a"][0].sync is None
    assert convert_norm(convert_sync(net), to="inplace")["a"][0].sync is not None
    with pytest.raises(UserError, match="to must be 'batchnorm' or 'inplace', got 'syncbn'"):
        convert_norm(net, to="syncbn")


# --- compile and export
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["inplace", "batchnorm"])
def test_compiles_without_a_graph_break(kind: str, training: bool) -> None:
    net = convert_norm(small_net(), to=kind).train(training)
    compiled = torch.compile(copy.deepcopy(net), backend="aot_eager", fullgraph=True)
    x = seeded(*SHAPE)
    ours, theirs = compiled(x), net(x)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    assert torch.allclose(ours, theirs, atol=1e-5)
    for (name, a), b in zip(compiled._orig_mod.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name
    for (name, a), b in zip(compiled._orig_mod.named_buffers(), net.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("kind", ["inplace", "batchnorm"])
def test_exports_with_a_dynamic_batch(kind: str) -> None:
    net = convert_norm(small_net(), to=kind).eval()
    program = torch.export.export(net, (seeded(2, 6, 7, 5),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("batch_norm" in name for name in names)
    x = seeded(5, 6, 7, 5)
    with torch.no_grad():
        assert torch.allclose(program.module()(x), net(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["inplace", "batchnorm"])
def test_onnx_sees_batch_normalization(kind: str) -> None:
    """A runtime folds what it recognises: one BatchNormalization and one LeakyRelu, nothing of our own arithmetic."""
    net = nn.Sequential(norm_act(kind, 6, activation="leaky_relu"), nn.MaxPool2d(2)).eval()
    program = torch.onnx.export(
        net, (seeded(2, 6, 8, 8),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},), dynamo=True, verbose=False
    )
    assert program is not None
    assert [node.op_type for node in program.model.graph] == ["BatchNormalization", "LeakyRelu", "MaxPool"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu(layout: torch.memory_format) -> None:
    norm = randomised(InPlaceABN(6, activation="leaky_relu")).cuda()
    twin = torch_norm(norm, "leaky_relu", 0.01).cuda()
    x, dy = (seeded(*SHAPE, seed=s).cuda().contiguous(memory_format=layout) for s in (6, 7))
    for a, b in zip(gradients(norm, x, dy), gradients(twin, x, dy), strict=True):
        assert relative(a, b) < 1e-5
