"""Muon against a singular value decomposition, torch's own Muon and AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import convscale as cs
from convscale.learn import optim
from convscale.learn.optim import NEWTON_SCHULZ, Muon, build_optimizer, orthogonal, set_lr
from convscale.learn.recipe import Recipe
from convscale.learn.recipes import get_recipe

RECIPE = Recipe(name="x", optimizer="muon", lr=0.02, momentum=0.6, beta2=0.99, weight_decay=0.05)


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "native_precisions", lambda device: ["fp32"])


@pytest.mark.parametrize("shape", [(2, 8, 30), (1, 30, 8), (3, 5, 5)])
def test_singular_vectors_stay_and_values_follow_the_polynomial(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, dtype=torch.float32)
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.square().sum(1, keepdim=True).sqrt()
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonal(matrices).double(), u @ torch.diag_embed(s) @ vh, rtol=0, atol=2e-4)


def test_steps_are_those_of_torchs_muon_and_adamw() -> None:
    """torch's takes matrices alone: a 1x1 convolution's kernel is one."""
    conv, last, conv2, last2 = nn.Conv2d(6, 8, 1), nn.Linear(8, 3), nn.Conv2d(6, 8, 1), nn.Linear(8, 3)
    net = nn.Sequential(conv, nn.Flatten(), last)
    nn.Sequential(conv2, nn.Flatten(), last2).load_state_dict(net.state_dict())
    matrix = nn.Parameter(conv2.weight.detach().flatten(1).clone())
    bias2 = conv2.bias
    assert bias2 is not None
    ours = build_optimizer(net, RECIPE)
    set_lr(ours, 0.02)
    kernel = torch.optim.Muon(
        [matrix], lr=0.02, momentum=0.6, weight_decay=0.05, adjust_lr_fn="match_rms_adamw", eps=1e-30
    )
    vectors = torch.optim.AdamW([bias2, last2.bias], lr=0.004, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    linear = torch.optim.AdamW([last2.weight], lr=0.004, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
    for step in range(4):
        grads = [torch.randn_like(param) for param in net.parameters()]
        for param, grad in zip(net.parameters(), grads, strict=True):
            param.grad = grad.clone()
        # torch keeps (1 - momentum) g, which the norm takes away again, and multiplies in bfloat16.
        matrix.grad = grads[0].flatten(1).clone()
        bias2.grad, last2.weight.grad, last2.bias.grad = (grad.clone() for grad in grads[1:])
        for optimizer in (ours, kernel, vectors, linear):
            optimizer.step()
        torch.testing.assert_close(conv.weight.flatten(1), matrix, rtol=0, atol=2e-3 * (step + 1) ** 0.5)
    torch.testing.assert_close(conv.bias, bias2)
    torch.testing.assert_close(last.weight, last2.weight)
    torch.testing.assert_close(last.bias, last2.bias)


def test_kernels_and_others_are_told_apart() -> None:
    """Depthwise kernels, norms and the classifier take AdamW's step at a fifth of the rate; a group is a matrix."""
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, groups=2), nn.Linear(12, 2)
    )
    optimizer = build_optimizer(net, RECIPE)
    set_lr(optimizer, 1.0)
    found = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    assert [found[id(net[i].weight)]["matrices"] for i in range(4)] == [1, 0, 2, 0]
    assert [found[id(net[i].weight)]["lr"] for i in range(4)] == [1.0, 0.2, 1.0, 0.2]
    assert [found[id(param)]["weight_decay"] for param in (net[0].weight, net[1].bias, net[3].weight)] == [
        0.05,
        0,
        0.05,
    ]


def test_groups_step_as_if_they_were_apart() -> None:
    torch.manual_seed(3)
    whole, parts = torch.randn(6, 2, 3, 3), []
    grad = torch.randn_like(whole)
    together = nn.Parameter(whole.clone())
    together.grad = grad.clone()
    Muon([{"params": [together], "matrices": 2}], lr=0.1, momentum=0.0).step()
    for half in (slice(0, 3), slice(3, 6)):
        part = nn.Parameter(whole[half].clone())
        part.grad = grad[half].clone()
        Muon([{"params": [part], "matrices": 1}], lr=0.1, momentum=0.0).step()
        parts.append(part.detach())
    torch.testing.assert_close(together.detach(), torch.cat(parts))


def test_the_recipe_small_uses_it() -> None:
    recipe = get_recipe("small")
    assert (recipe.optimizer, recipe.others_lr) == ("muon", 0.2)
    net = cs.create_model(cs.scale("efficientnet_b0", width=0.25, depth=0.25), num_classes=4)
    optimizer = build_optimizer(net, recipe)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
