"""What one call of a network costs, counted operator by operator."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from convscale.cache import load, save
from convscale.conditions import Conditions, Size
from convscale.cost.fusion import launched_kernels
from convscale.cost.liveness import peak_bytes, saved_for_backward
from convscale.cost.subject import Network, pass_key, subject_of
from convscale.cost.trace import Operator, Trace, Use
from convscale.cost.tracing import trace
from convscale.networks.resolve import build_meta


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call costs; ``macs`` and ``activations`` are per image, bytes are of the whole batch."""

    params: int
    """Parameters, shared ones once."""
    macs: int
    """Multiply-accumulates per image (forward; in training forward and backward)."""
    activations: int
    """Elements that convolutions and linear layers put out per image in the forward pass."""
    read_bytes: int
    """Bytes that operators read in a call; compiled: that the fused kernels read."""
    written_bytes: int
    """Bytes that operators write in a call; compiled: that the fused kernels write."""
    kernels: int
    """Kernels that a GPU would launch in a call."""
    peak_bytes: int
    """Most bytes alive at once: weights, the input, and every map from its first write to its last use; the runtime's
    workspaces are not in it."""
    weight_bytes: int
    """Bytes of parameters and buffers."""
    optimizer_bytes: int
    """Bytes of the optimiser's state in training: a momentum for each parameter that has a gradient; 0 for inference.
    """
    saved_bytes: int
    """Bytes that the forward pass keeps for the backward one, weights left out; 0 for inference. Under autocast the
    weights' casts are among them."""
    unsupported: dict[str, int]
    """Operators of unknown kind and how often they came; their bytes are counted, their MACs are not."""
    batch_size: int
    """Images a call."""
    image_size: tuple[int, int]
    """Height and width of the input in pixels."""
    mode: str
    """``infer`` or ``train``."""
    precision: str
    """``fp32``, ``amp``, ``amp_bf16``, ``bf16`` or ``fp16``."""
    layout: str
    """``nchw`` or ``nhwc``."""
    compiled: bool
    """Whether bytes and kernels are those behind a compiler that fuses; else as dispatched in eager mode. Peak and
    saved bytes are eager ones."""
    operators: tuple[Operator, ...] = dataclasses.field(repr=False)
    """Every operator in the order of dispatch."""


def cost_of(traced: Trace, *, compiled: bool = False) -> Cost:
    """The sums of a trace."""
    launched = launched_kernels(traced, compiled=compiled)
    if compiled:
        read = sum(kernel.in_bytes + kernel.weight_bytes for kernel in launched)
        written = sum(kernel.out_bytes for kernel in launched)
    else:
        read = sum(operator.read_bytes for operator in traced.operators)
        written = sum(operator.written_bytes for operator in traced.operators)
    outputs = (
        use.nbytes // use.itemsize
        for operator in traced.operators
        if operator.kind in ("conv", "linear") and operator.phase == "forward"
        for use in operator.outputs[:1]
    )
    # Of an update's inputs (weight, gradient, momentum) only the last is the optimiser's own.
    momenta = {operator.inputs[-1].storage for operator in traced.operators if operator.phase == "update"}
    return Cost(
        params=traced.params,
        macs=sum(operator.macs for operator in traced.operators) // traced.batch_size,
        activations=sum(outputs) // traced.batch_size,
        read_bytes=read,
        written_bytes=written,
        kernels=len(launched),
        peak_bytes=peak_bytes(traced),
        weight_bytes=sum(traced.storages[number] for number in traced.weights - momenta),
        optimizer_bytes=sum(traced.storages[number] for number in momenta),
        saved_bytes=saved_for_backward(traced),
        unsupported=traced.unsupported,
        batch_size=traced.batch_size,
        image_size=traced.image_size,
        mode=traced.conditions.mode,
        precision=traced.conditions.precision,
        layout=traced.conditions.layout,
        compiled=compiled,
        operators=traced.operators,
    )


def trace_of(network: Network, conditions: Conditions) -> Trace:
    """The trace of a network, a spec or a model's name; a spec's is read from the cache where it was traced before.
    Raises as ``count``.
    """
    net, spec, conditions = subject_of(network, conditions)
    if spec is None:
        assert net is not None  # a network is one of the two
        return trace(net, conditions)
    key = pass_key("trace", spec, conditions)
    if (kept := load(key)) is not None:
        return _unpacked(kept, conditions)
    traced = trace(build_meta(spec), conditions)
    save(key, _packed(traced))
    return traced


def count(
    net_or_spec: Network,
    image_size: Size | None = None,
    batch_size: int = 1,
    *,
    mode: str = "infer",
    precision: str = "fp32",
    layout: str = "nchw",
    compiled: bool = False,
) -> Cost:
    """Count what one call of a network costs, without computing it.

    Args:
        net_or_spec: any module (its ``training`` flags are ignored, its device does not matter), a NetSpec, or a
            model's name.
        image_size: the input's side in pixels, or (height, width); None: the network's own.
        batch_size: images a call.
        mode: ``infer`` (the forward pass) or ``train`` (forward, backward and an SGD step with momentum).
        precision: ``fp32``; ``amp`` or ``amp_bf16`` (also called ``bf16``) under CUDA's autocast policy; ``fp16``.
            ``int8`` is refused: which layers hold 8 bits is settled when a network is exported.
        layout: ``nchw`` or ``nhwc``.
        compiled: bytes and kernels as PyTorch's compiler would fuse them, by our simulation of it; else as eager mode
            dispatches them.

    Raises:
        UserError: the network does not say its size and none is given; it can not be traced (the message names the
            operator); a bad argument.
    """
    conditions = Conditions(mode=mode, precision=precision, layout=layout, batch_size=batch_size, image_size=image_size)
    return cost_of(trace_of(net_or_spec, conditions), compiled=compiled)


def _packed(traced: Trace) -> dict[str, object]:
    """A trace as JSON values; named tuples become lists."""
    value = {field.name: getattr(traced, field.name) for field in dataclasses.fields(traced)}
    del value["conditions"]  # they stand in the key
    return {**value, "weights": sorted(traced.weights), "results": sorted(traced.results)}


def _unpacked(value: dict[str, Any], conditions: Conditions) -> Trace:
    """What ``_packed`` made, read back from JSON."""

    def use(fields: list[Any]) -> Use:
        return Use(fields[0], tuple(fields[1]), *fields[2:])

    def operator(fields: list[Any]) -> Operator:
        name, kind, scope, phase, inputs, outputs, macs, groups, kernel, stride, *rest = fields
        uses = tuple(map(use, inputs)), tuple(map(use, outputs))
        return Operator(name, kind, scope, phase, *uses, macs, groups, tuple(kernel), tuple(stride), *rest)

    return Trace(
        **{
            **value,
            "operators": tuple(map(operator, value["operators"])),
            "storages": tuple(value["storages"]),
            "weights": frozenset(value["weights"]),
            "results": frozenset(value["results"]),
            "conditions": conditions,
        }
    )
