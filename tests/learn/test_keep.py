"""What a run keeps beside its weights leaves a GPU's memory, and is waited for when it is read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convscale.learn import keep
from convscale.learn.keep import Waited, copied, copied_state
from convscale.learn.train import train
from tests.learn.nets import halves_data, small_net
from tests.learn.test_train import QUICK


class Card:
    """Stands for a GPU: copies to the host come when they are waited for."""

    def __init__(self) -> None:
        self.sent: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.waits = 0

    def memory(self, value: torch.Tensor) -> torch.Tensor:
        card = self

        class Target:
            def copy_(self, source: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
                assert non_blocking
                host = torch.full_like(source, -1)
                card.sent.append((host, source.clone()))
                return host

        return Target()  # pyright: ignore[reportReturnType]

    def event(self) -> Any:
        sent = self.sent

        def record(stream: object) -> None:
            assert stream == "training"

        def synchronize() -> None:
            self.waits += 1
            while sent:
                host, source = sent.pop()
                host.copy_(source)

        return SimpleNamespace(record=record, synchronize=synchronize)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(keep, "_on_card", lambda value: True)
    monkeypatch.setattr(keep, "_host_memory", card.memory)
    monkeypatch.setattr(keep, "cuda", SimpleNamespace(Event=card.event, current_stream=lambda device: "training"))
    return card


class Holder:
    weights: Waited[dict[str, torch.Tensor]] = Waited()


def test_weights_are_sent_and_waited_for_when_they_are_read(card: Card) -> None:
    net, holder = small_net(), Holder()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert holder.weights is None
    holder.weights = copied(net)
    assert (len(card.sent), card.waits) == (len(before), 0)
    for parameter in net.parameters():
        parameter.data.zero_()
    found = holder.weights
    assert found is not None
    assert found is holder.weights
    assert card.waits == 1
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], value) and not found[name].requires_grad for name, value in before.items())


def test_on_a_processor_nothing_is_waited_for() -> None:
    net = small_net()
    found = copied(net).wait()
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
    assert found["0.weight"].data_ptr() != net.state_dict()["0.weight"].data_ptr()


def test_a_training_state_is_sent_whole_and_once(card: Card) -> None:
    shared = torch.tensor([1.0, 2.0])
    state = {"net": {"a": shared}, "optimizer": {"state": {0: {"m": torch.ones(3)}}, "groups": [{"lr": 0.1}]}}
    copy = copied_state({**state, "best": {"a": shared}})
    assert len(card.sent) == 2
    shared.zero_()
    state["optimizer"]["groups"][0]["lr"] = 7.0
    found = copy.wait()
    assert found["net"]["a"].tolist() == [1.0, 2.0]
    assert found["best"]["a"] is found["net"]["a"]
    assert found["optimizer"]["state"][0]["m"].tolist() == [1.0, 1.0, 1.0]
    assert found["optimizer"]["groups"] == [{"lr": 0.1}]


def test_a_run_is_the_same_where_its_copies_are_sent(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = QUICK.override({"epochs": 2, "join_start": True})

    def run() -> list[torch.Tensor]:
        torch.manual_seed(5)
        return [value.clone() for value in train(small_net(), halves_data(48), recipe=recipe).net.state_dict().values()]

    sent = run()
    assert card.waits >= 3  # of the start, the best, the last before they are joined
    monkeypatch.setattr(keep, "_on_card", lambda value: False)
    assert all(torch.equal(a, b) for a, b in zip(sent, run(), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_copies_take_none_of_its_memory() -> None:
    net = small_net().cuda()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    taken = torch.cuda.memory_allocated()
    copy = copied(net)
    for parameter in net.parameters():
        parameter.data.zero_()
    found = copy.wait()
    assert torch.cuda.memory_allocated() == taken
    assert all(found[name].is_pinned() and torch.equal(found[name], value.cpu()) for name, value in before.items())
