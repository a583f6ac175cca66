"""Converters of other libraries put plain norms in the place of ours: no activation goes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import convscale as cs
from convscale.nn.norm import BatchNormAct
from tests.nn.test_weights import randomise


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "tresnet_m"])
def test_torchs_sync_batch_norm_keeps_activations(name: str) -> None:
    net = randomise(cs.create_model(name, num_classes=3, norm="batchnorm")).eval()
    net.stages[0].train()
    x, keys = torch.randn(1, 3, 64, 64), list(net.state_dict())
    before = {key: (m.activation, m.training) for key, m in net.named_modules() if isinstance(m, BatchNormAct)}
    weight = net.stem[0].norm.weight
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))
    after = {key: (m.activation, m.training) for key, m in converted.named_modules() if isinstance(m, BatchNormAct)}
    assert after == before
    assert sum(kind != "identity" for kind, _ in after.values()) > 5
    assert all(m.sync is not None for m in converted.modules() if isinstance(m, BatchNormAct))
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert list(converted.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(converted.eval()(x), net.eval()(x))
    assert nn.SyncBatchNorm.convert_sync_batchnorm(net).stem[0].norm.weight is weight, "the optimizer's parameter stays"


def test_the_group_of_processes_is_torchs() -> None:
    group = object()
    net = nn.SyncBatchNorm.convert_sync_batchnorm(cs.create_model("resnet18"), group)
    assert net.stages[1][0].conv2.norm.sync.resolve() is group


def test_norms_behind_a_pool_and_in_front_of_a_stage_too() -> None:
    spec = cs.get_spec("mobilenetv4_conv_small")
    net = randomise(cs.create_model(spec, num_classes=3)).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(nn.SyncBatchNorm.convert_sync_batchnorm(net)(x), before)
    assert net.pooled is not None
    assert isinstance(net.pooled.norm, BatchNormAct)


def test_a_frozen_norm_would_take_the_activation_away() -> None:
    freeze = pytest.importorskip("timm.utils.model").freeze_batch_norm_2d
    net = randomise(cs.create_model("resnet18", num_classes=3)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        with pytest.raises(cs.UserError, match=r"FrozenBatchNorm2d in place of a BatchNormAct .* activation, relu"):
            freeze(net)
        assert torch.equal(net(x), before)
    unit = net.stages[0][0].conv2  # no activation to lose
    unit.add_module("norm", nn.Identity())
    assert isinstance(unit.norm, nn.Identity)
