"""Where others keep the tensors of our networks: per layout, a table from our module names to theirs.

A tensor's key is its module's name and a leaf (``weight``, ``running_mean`` ...; ``0.weight`` inside a split
convolution) that all layouts share, so a table of modules is a bijection of keys: the same one loads and exports. Where
somebody's leaf has a name of its own, the table has the whole tensor.

``BLOCK_KEYS`` says what a kind of block holds, ``LAYOUTS`` which tables exist for which families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from convscale.arch.block import BlockSpec
from convscale.arch.spec import NetSpec

Table = dict[str, str]
"""Our module name -> theirs."""


@dataclass(frozen=True, kw_only=True)
class BlockKeys:
    """What a kind of block holds."""

    convs: tuple[int, ...]
    """Numbers of its convolutions in our naming (``conv0`` to ``conv3``)."""
    spatial: int
    """The one of them that takes the stride."""
    timm: tuple[str, ...] = ()
    """timm's names of them in its mobile nets, with a dot where their norm stands beside them; empty: it has no such
    block there."""
    others: tuple[str, ...] = ()
    """Names of what else it may hold in our naming."""


BLOCK_KEYS = {
    "basic": BlockKeys(convs=(1, 2), spatial=1),
    "bottleneck": BlockKeys(convs=(1, 2, 3), spatial=2),
    "depthwise_separable": BlockKeys(convs=(2, 3), spatial=2, timm=("conv_dw", "conv_pw")),
    "inverted_residual": BlockKeys(convs=(1, 2, 3), spatial=2, timm=("conv_pw", "conv_dw", "conv_pwl")),
    "conv": BlockKeys(convs=(1,), spatial=1, timm=("conv",)),
    "fused_inverted_residual": BlockKeys(convs=(1, 2), spatial=1, timm=("conv_exp", "conv_pwl")),
    "universal": BlockKeys(
        convs=(0, 1, 2, 3), spatial=2, timm=("dw_start.conv", "pw_exp.conv", "dw_mid.conv", "pw_proj.conv")
    ),
    "convnext": BlockKeys(
        convs=(1,), spatial=1, others=("down.norm", "down.conv", "expand", "grn", "project", "scale")
    ),
    "aggregated": BlockKeys(convs=(), spatial=0),
}
"""By the kind that a ``BlockSpec`` says."""


def _blocks(spec: NetSpec) -> Iterator[tuple[int, int, BlockSpec, int]]:
    """(stage, index in the stage, block, stride) in the order of the net."""
    for i, stage in enumerate(spec.stages):
        runs = [run.block for run in stage.runs for _ in range(run.repeat)]
        for j, block in enumerate(runs):
            yield i, j, block, stage.stride if j == 0 else 1


def _convs(block: BlockSpec) -> tuple[int, ...]:
    """Numbers of the block's convolutions in our naming."""
    return BLOCK_KEYS[block.kind].convs


def _unit(table: Table, ours: str, conv: str, norm: str, affine: str = "") -> None:
    table[f"{ours}.conv"] = conv
    table[f"{ours}.norm"] = norm
    if affine:
        table[f"{ours}.affine"] = affine


def _aggregated_units(block: BlockSpec) -> list[tuple[str, str]]:
    """Units of an aggregated block, by our names and timm's inside it."""
    units = [("squeeze", "aggregation.0"), ("excite", "aggregation.1")]
    for k in range(block.layers):
        one = f"layers.{k}"
        units += [(f"{one}.0", f"{one}.conv1"), (f"{one}.1", f"{one}.conv2")] if block.light else [(one, one)]
    return units


def native(spec: NetSpec) -> Table:
    """Our own keys."""
    table: Table = {"classifier": "classifier"}
    units = [f"stem.{k}" for k in range(spec.stem.convs)] + ["pooled"]
    for i, j, block, stride in _blocks(spec):
        ours = f"stages.{i}.{j}"
        units += [f"{ours}.conv{k}" for k in _convs(block)]
        units += [f"{ours}.{name}" for name, _ in (*_aggregated_units(block), ("down", ""))]
        if block.se:
            table |= {f"{ours}.se.{part}": f"{ours}.se.{part}" for part in ("reduce", "expand")}
        table |= {f"{ours}.{name}": f"{ours}.{name}" for name in BLOCK_KEYS[block.kind].others}
        at = _shortcut_index(block, stride)
        _unit(table, f"{ours}.shortcut.{at}", f"{ours}.shortcut.{at}.conv", f"{ours}.shortcut.{at}.norm")
    if spec.head.width:
        units.append("head")
    for unit in units:
        _unit(table, unit, f"{unit}.conv", f"{unit}.norm", f"{unit}.affine")
    return table


def _shortcut_index(block: BlockSpec, stride: int) -> int:
    """The projection's place in our shortcut: behind the pool where there is one."""
    return 1 if block.shortcut == "avgpool" and stride > 1 else 0


def timm_tresnet(spec: NetSpec) -> Table:
    """timm's keys of TResNets."""
    table: Table = {"classifier": "head.fc"}
    _unit(table, "stem.0", "body.conv1.conv", "body.conv1.bn")
    for i, j, block, stride in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"body.layer{i + 1}.{j}"
        for k in _convs(block):
            _unit(table, f"{ours}.conv{k}", f"{theirs}.conv{k}.conv", f"{theirs}.conv{k}.bn")
        table |= {f"{ours}.se.reduce": f"{theirs}.se.fc1", f"{ours}.se.expand": f"{theirs}.se.fc2"}
        at = _shortcut_index(block, stride)
        _unit(table, f"{ours}.shortcut.{at}", f"{theirs}.downsample.{at}.conv", f"{theirs}.downsample.{at}.bn")
    return table


def timm_resnet(spec: NetSpec) -> Table:
    """timm's keys of ResNets; torchvision's are the same."""
    table: Table = {"classifier": "fc"}
    if spec.stem.kind == "deep":
        for k, (conv, norm) in enumerate((("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1"))):
            _unit(table, f"stem.{k}", conv, norm)
    else:
        _unit(table, "stem.0", "conv1", "bn1")
    for i, j, block, stride in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"layer{i + 1}.{j}"
        for k in _convs(block):
            _unit(table, f"{ours}.conv{k}", f"{theirs}.conv{k}", f"{theirs}.bn{k}")
        table |= {f"{ours}.se.reduce": f"{theirs}.se.fc1", f"{ours}.se.expand": f"{theirs}.se.fc2"}
        conv = 1 if block.shortcut == "avgpool" else 0  # timm keeps the pool's place even where it pools nothing
        _unit(
            table,
            f"{ours}.shortcut.{_shortcut_index(block, stride)}",
            f"{theirs}.downsample.{conv}",
            f"{theirs}.downsample.{conv + 1}",
        )
    return table


def timm_regnet(spec: NetSpec) -> Table:
    """timm's keys of RegNets."""
    table: Table = {"classifier": "head.fc"}
    _unit(table, "stem.0", "stem.conv", "stem.bn")
    for i, j, block, stride in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"s{i + 1}.b{j + 1}"
        for k in _convs(block):
            _unit(table, f"{ours}.conv{k}", f"{theirs}.conv{k}.conv", f"{theirs}.conv{k}.bn")
        table |= {f"{ours}.se.reduce": f"{theirs}.se.fc1", f"{ours}.se.expand": f"{theirs}.se.fc2"}
        at = _shortcut_index(block, stride)
        _unit(table, f"{ours}.shortcut.{at}", f"{theirs}.downsample.conv", f"{theirs}.downsample.bn")
    return table


def timm_convnext(spec: NetSpec) -> Table:
    """timm's keys of ConvNeXts."""
    table: Table = {"classifier": "head.fc", "pooled.norm": "head.norm"}
    _unit(table, "stem.0", "stem.0", "stem.1")
    for i, j, _, _ in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"stages.{i}.blocks.{j}"
        _unit(table, f"{ours}.conv1", f"{theirs}.conv_dw", f"{theirs}.norm")
        table |= {f"{ours}.expand": f"{theirs}.mlp.fc1", f"{ours}.project": f"{theirs}.mlp.fc2"}
        table |= {f"{ours}.grn": f"{theirs}.mlp.grn", f"{ours}.scale": theirs}
        if j == 0:
            table |= {f"{ours}.down.norm": f"stages.{i}.downsample.0", f"{ours}.down.conv": f"stages.{i}.downsample.1"}
    return table


def timm_hgnet(spec: NetSpec) -> Table:
    """timm's keys of HGNetV2."""
    table: Table = {"classifier": "head.fc", "pooled.conv": "head.last_conv.0", "pooled.affine": "head.last_conv.2"}
    units = [(f"stem.{k}", f"stem.stem{name}") for k, name in enumerate(("1", "2a", "2b", "3", "4"))]
    for i, j, block, _ in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"stages.{i}.blocks.{j}"
        units += [(f"{ours}.{name}", f"{theirs}.{timms}") for name, timms in _aggregated_units(block)]
        if j == 0:
            units.append((f"{ours}.down", f"stages.{i}.downsample"))
    for ours, theirs in units:
        _unit(table, ours, f"{theirs}.conv", f"{theirs}.bn", f"{theirs}.lab")
    return table


def timm_mobile(spec: NetSpec) -> Table:
    """timm's keys of nets of depthwise blocks."""
    table: Table = {"classifier": "classifier"}
    _unit(table, "stem.0", "conv_stem", "bn1")
    for i, j, block, _ in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"blocks.{i}.{j}"
        for number, (k, conv) in enumerate(zip(_convs(block), BLOCK_KEYS[block.kind].timm, strict=True), start=1):
            norm = conv.replace(".conv", ".bn") if "." in conv else f"bn{number}"
            _unit(table, f"{ours}.conv{k}", f"{theirs}.{conv}", f"{theirs}.{norm}")
        table |= {f"{ours}.se.{part}": f"{theirs}.se.conv_{part}" for part in ("reduce", "expand")}
    if spec.head.pooled_width:
        _unit(table, "pooled", "conv_head", "norm_head")
    else:
        _unit(table, "head", "conv_head", "bn2")
    return table


def official_tresnet(spec: NetSpec) -> Table:
    """The authors' TResNet code: convolution and norm are numbered 0 and 1, one level deeper where a blur follows."""
    table: Table = {"classifier": "head.fc"}
    _unit(table, "stem.0", "body.conv1.0", "body.conv1.1")
    for i, j, block, stride in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"body.layer{i + 1}.{j}"
        spatial = BLOCK_KEYS[block.kind].spatial
        for k in _convs(block):
            deeper = ".0" if k == spatial and stride > 1 and block.downsample == "blur" else ""
            _unit(table, f"{ours}.conv{k}", f"{theirs}.conv{k}{deeper}.0", f"{theirs}.conv{k}{deeper}.1")
        table |= {f"{ours}.se.reduce": f"{theirs}.se.fc1", f"{ours}.se.expand": f"{theirs}.se.fc2"}
        at = _shortcut_index(block, stride)
        _unit(table, f"{ours}.shortcut.{at}", f"{theirs}.downsample.{at}.0", f"{theirs}.downsample.{at}.1")
    return table


def _torchvision_block(table: Table, ours: str, theirs: str, block: BlockSpec) -> None:
    """A mobile block as one sequence, with squeeze-and-excitation before its last convolution."""
    *first, last = _convs(block)
    for n, k in enumerate(first):
        _unit(table, f"{ours}.conv{k}", f"{theirs}.{n}.0", f"{theirs}.{n}.1")
    n = len(first)
    if block.se:
        table |= {f"{ours}.se.reduce": f"{theirs}.{n}.fc1", f"{ours}.se.expand": f"{theirs}.{n}.fc2"}
        n += 1
    _unit(table, f"{ours}.conv{last}", f"{theirs}.{n}.0", f"{theirs}.{n}.1")


def torchvision_efficientnet(spec: NetSpec) -> Table:
    """torchvision's keys of EfficientNets."""
    table: Table = {"classifier": "classifier.1"}
    _unit(table, "stem.0", "features.0.0", "features.0.1")
    for i, j, block, _ in _blocks(spec):
        _torchvision_block(table, f"stages.{i}.{j}", f"features.{i + 1}.{j}.block", block)
    end = f"features.{len(spec.stages) + 1}"
    _unit(table, "head", f"{end}.0", f"{end}.1")
    return table


def torchvision_mobilenetv3(spec: NetSpec) -> Table:
    """torchvision's keys of MobileNetV3."""
    table: Table = {"classifier": "classifier.3", "pooled.conv": "classifier.0"}
    _unit(table, "stem.0", "features.0.0", "features.0.1")
    for number, (i, j, block, _) in enumerate(_blocks(spec), start=1):
        ours, theirs = f"stages.{i}.{j}", f"features.{number}"
        if block.kind == "conv":
            _unit(table, f"{ours}.conv1", f"{theirs}.0", f"{theirs}.1")
        else:
            _torchvision_block(table, ours, f"{theirs}.block", block)
    return table


def torchvision_mobilenetv2(spec: NetSpec) -> Table:
    """torchvision's keys of MobileNetV2."""
    table: Table = {"classifier": "classifier.1"}
    _unit(table, "stem.0", "features.0.0", "features.0.1")
    number = 0
    for i, j, block, _ in _blocks(spec):
        number += 1
        ours, theirs = f"stages.{i}.{j}", f"features.{number}.conv"
        *first, last = _convs(block)
        for n, k in enumerate(first):
            _unit(table, f"{ours}.conv{k}", f"{theirs}.{n}.0", f"{theirs}.{n}.1")
        _unit(table, f"{ours}.conv{last}", f"{theirs}.{len(first)}", f"{theirs}.{len(first) + 1}")
    _unit(table, "head", f"features.{number + 1}.0", f"features.{number + 1}.1")
    return table


def torchvision_mnasnet(spec: NetSpec) -> Table:
    """torchvision's keys of MnasNet: one flat sequence of convolution, norm and ReLU, in which the first block stands;
    the others are sequences of their own.
    """
    table: Table = {"classifier": "classifier.1"}
    for ours, n in (("stem.0", 0), ("stages.0.0.conv2", 3), ("stages.0.0.conv3", 6), ("head", 14)):
        _unit(table, ours, f"layers.{n}", f"layers.{n + 1}")
    for i, j, block, _ in _blocks(spec):
        if i > 0:
            for n, k in enumerate(_convs(block)):
                theirs = f"layers.{i + 7}.{j}.layers"
                _unit(table, f"stages.{i}.{j}.conv{k}", f"{theirs}.{3 * n}", f"{theirs}.{3 * n + 1}")
    return table


def torchvision_regnet(spec: NetSpec) -> Table:
    """torchvision's keys of RegNets: the convolutions of a block are a, b and c."""
    table: Table = {"classifier": "fc"}
    _unit(table, "stem.0", "stem.0", "stem.1")
    for i, j, block, stride in _blocks(spec):
        stage = f"block{i + 1}"
        ours, theirs = f"stages.{i}.{j}", f"trunk_output.{stage}.{stage}-{j}"
        for k, letter in zip(_convs(block), "abc", strict=True):
            _unit(table, f"{ours}.conv{k}", f"{theirs}.f.{letter}.0", f"{theirs}.f.{letter}.1")
        table |= {f"{ours}.se.reduce": f"{theirs}.f.se.fc1", f"{ours}.se.expand": f"{theirs}.f.se.fc2"}
        _unit(table, f"{ours}.shortcut.{_shortcut_index(block, stride)}", f"{theirs}.proj.0", f"{theirs}.proj.1")
    return table


def torchvision_convnext(spec: NetSpec) -> Table:
    """torchvision's keys of ConvNeXts: stem, downsamplings and stages in turn."""
    table: Table = {"classifier": "classifier.2", "pooled.norm": "classifier.0"}
    _unit(table, "stem.0", "features.0.0", "features.0.1")
    for i, j, _, _ in _blocks(spec):
        ours, theirs = f"stages.{i}.{j}", f"features.{2 * i + 1}.{j}"
        _unit(table, f"{ours}.conv1", f"{theirs}.block.0", f"{theirs}.block.2")
        table |= {f"{ours}.expand": f"{theirs}.block.3", f"{ours}.project": f"{theirs}.block.5"}
        table[f"{ours}.scale.gamma"] = f"{theirs}.{FACTORS}"
        if i > 0 and j == 0:
            table |= {f"{ours}.down.norm": f"features.{2 * i}.0", f"{ours}.down.conv": f"features.{2 * i}.1"}
    return table


def efficientnet_pytorch(spec: NetSpec) -> Table:
    """The PyPI packages efficientnet_pytorch, and efficientnet_lite_pytorch made of it: blocks are numbered through the
    net, norms by their place in a block.
    """
    table: Table = {"classifier": "_fc"}
    _unit(table, "stem.0", "_conv_stem", "_bn0")
    for number, (i, j, block, _) in enumerate(_blocks(spec)):
        ours, theirs = f"stages.{i}.{j}", f"_blocks.{number}"
        names = {1: ("_expand_conv", "_bn0"), 2: ("_depthwise_conv", "_bn1"), 3: ("_project_conv", "_bn2")}
        for k in _convs(block):
            _unit(table, f"{ours}.conv{k}", f"{theirs}.{names[k][0]}", f"{theirs}.{names[k][1]}")
        if block.se:
            table |= {f"{ours}.se.{part}": f"{theirs}._se_{part}" for part in ("reduce", "expand")}
    _unit(table, "head", "_conv_head", "_bn1")
    return table


FACTORS = "layer_scale"
"""torchvision's leaf of a factor per channel, (C, 1, 1) there and (C,) here."""
TENSORFLOW_EPS = 1e-3
"""Of the batch norms of networks that TensorFlow trained."""


def _first(spec: NetSpec) -> BlockSpec:
    return spec.stages[0].runs[0].block


def _last(spec: NetSpec) -> BlockSpec:
    return spec.stages[-1].runs[-1].block


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The keys that somebody gives to the networks of some families."""

    name: str
    """Whose they are."""
    families: tuple[str, ...]
    """``NetSpec.family`` of the networks."""
    table: Callable[[NetSpec], Table]
    """Makes the table of one of them."""
    only: Callable[[NetSpec], bool] = lambda spec: True
    """Which members of the families have such keys."""
    linear: tuple[str, ...] = ()
    """Our convolutions of pooled features that are linear layers there: weights (O, I) in place of (O, I, 1, 1)."""
    eps: float | None = None
    """Of all norms that weights in this layout were trained with; None: what the spec says."""
    same_padding: bool = False
    """Whether they were trained with TensorFlow's SAME padding."""


def _is_torchvisions(spec: NetSpec) -> bool:
    """Whether torchvision builds such an EfficientNet: with squeeze-and-excitation, padded on both sides."""
    return _first(spec).se is not None and spec.padding == "symmetric"


_MOBILE = ("efficientnet", "mobilenet", "mnasnet", "mixnet", "mobilenetv4")
LAYOUTS = [
    Layout(name="timm", families=("tresnet",), table=timm_tresnet),
    Layout(name="timm", families=("resnet",), table=timm_resnet),
    Layout(name="timm", families=_MOBILE, table=timm_mobile),
    Layout(name="timm", families=("regnet",), table=timm_regnet),
    Layout(name="timm", families=("mobilenetv3", "efficientnetv2"), table=timm_mobile),
    Layout(name="timm", families=("convnext",), table=timm_convnext),
    Layout(name="timm", families=("hgnetv2",), table=timm_hgnet),
    Layout(name="official", families=("tresnet",), table=official_tresnet),
    Layout(
        name="torchvision",
        families=("resnet",),
        table=timm_resnet,
        only=lambda spec: spec.stem.kind == "conv" and _first(spec).se is None,
    ),
    Layout(
        name="torchvision",
        families=("efficientnet",),
        table=torchvision_efficientnet,
        only=lambda spec: _is_torchvisions(spec) and spec.stages[0].depth < 3,
    ),
    Layout(  # B5 to B7, whose norms are TensorFlow's there
        name="torchvision",
        families=("efficientnet",),
        table=torchvision_efficientnet,
        only=lambda spec: _is_torchvisions(spec) and spec.stages[0].depth >= 3,
        eps=1e-3,
    ),
    Layout(
        name="torchvision",
        families=("mobilenet",),
        table=torchvision_mobilenetv2,
        only=lambda spec: _last(spec).traits.takes_ratio,  # not V1, whose blocks have no expansion
    ),
    Layout(name="torchvision", families=("mnasnet",), table=torchvision_mnasnet),
    Layout(name="torchvision", families=("regnet",), table=torchvision_regnet),
    Layout(
        name="torchvision",
        families=("mobilenetv3",),
        table=torchvision_mobilenetv3,
        only=lambda spec: spec.padding == "symmetric",
        linear=("pooled.conv",),
        eps=1e-3,
    ),
    Layout(
        name="torchvision",
        families=("efficientnetv2",),
        table=torchvision_efficientnet,
        only=lambda spec: spec.padding == "symmetric" and _first(spec).kind == "conv",  # as published
        eps=1e-3,
    ),
    Layout(
        name="torchvision",
        families=("convnext",),
        table=torchvision_convnext,
        only=lambda spec: _first(spec).linear and not _first(spec).grn,
    ),
    Layout(
        name="efficientnet_lite_pytorch",
        families=("efficientnet",),
        table=efficientnet_pytorch,
        only=lambda spec: _first(spec).se is None,
        eps=TENSORFLOW_EPS,
        same_padding=True,
    ),
    Layout(
        name="efficientnet_pytorch",
        families=("efficientnet",),
        table=efficientnet_pytorch,
        only=lambda spec: _first(spec).se is not None,
        eps=TENSORFLOW_EPS,
        same_padding=True,
    ),
]
"""A family whose weights others have too gets a row."""
OWN = "convscale"
"""The name of our own layout, which every network has."""


def _fits(row: Layout, spec: NetSpec) -> bool:
    """Whether a row has a table for this network; one of the family with other kinds of blocks may have none."""
    if spec.family not in row.families or not row.only(spec):
        return False
    try:
        row.table(spec)
    except (KeyError, ValueError):  # a block with more convolutions, or others, than there are names for
        return False
    return True


def layouts(spec: NetSpec) -> dict[str, Callable[[NetSpec], Table]]:
    """Layouts known for this kind of network, by name; the first is our own."""
    known = {OWN: native}
    return known | {row.name: row.table for row in LAYOUTS if _fits(row, spec)}


def layout_of(spec: NetSpec, name: str) -> Layout | None:
    """The row that gives this kind of network its layout of that name; None for our own."""
    fitting = (row for row in LAYOUTS if row.name == name and _fits(row, spec))
    return next(fitting, None)


def layout_names() -> list[str]:
    """Every layout's name."""
    return list(dict.fromkeys([OWN, *(row.name for row in LAYOUTS)]))
