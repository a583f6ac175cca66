"""A rule of compound scaling as a value: its coefficients, and what they were found by."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from convscale.arch.codec import from_plain, require, to_plain
from convscale.arch.multipliers import RULES
from convscale.arch.parts import Part
from convscale.errors import UserError, check_path, nearest
from convscale.files import write_text
from convscale.read import json_of, read_text, yaml_of

RULE_FILES = (".json", ".yaml", ".yml")
"""How the names of files end that hold a rule."""


@dataclass(frozen=True, kw_only=True)
class ScalingRule(Part):
    """Coefficients of compound scaling (EfficientNet, eq. 3): phi multiplies depth by alpha^phi, width by beta^phi and
    the image's side by gamma^phi. ``scale`` takes one as its ``rule``.
    """

    alpha: float
    """Depth's base, at least 1."""
    beta: float
    """Width's."""
    gamma: float
    """The image's side's."""
    name: str = "custom"
    """What it is called."""
    cost: Literal["macs", "time"] = "macs"
    """What was held to ``budget`` when it was found."""
    budget: float = 2.0
    """How many times the cost grows with each phi."""
    baseline: str = ""
    """The network that it was found for."""
    conditions: str = ""
    """Under what conditions the cost holds."""
    notes: tuple[str, ...] = ()
    """How it was found, and how far it lies from the published one."""

    def validate(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            require(1 <= value <= 64, f"ScalingRule.{name}", value, "from 1 to 64")
        require(1 < self.budget <= 1024, "ScalingRule.budget", self.budget, "above 1 and at most 1024")

    @property
    def shares(self) -> tuple[float, float, float]:
        """Depth's, width's and resolution's share of the logarithm of alpha * beta^2 * gamma^2; of a rule that changes
        nothing all 0.
        """
        parts = [math.log(self.alpha), 2 * math.log(self.beta), 2 * math.log(self.gamma)]
        total = sum(parts)
        depth, width, resolution = (part / total if total else 0.0 for part in parts)
        return depth, width, resolution

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values, fields at their default left out."""
        return to_plain(self)

    @staticmethod
    def from_dict(values: Mapping[str, object]) -> ScalingRule:
        """The inverse of ``to_dict``; UserError on a value that does not fit."""
        rule = from_plain(ScalingRule, values, "rule")
        assert isinstance(rule, ScalingRule)
        return rule


def save_rule(rule: ScalingRule, path: str | os.PathLike[str]) -> None:
    """Write a rule as JSON or YAML, by the suffix of ``path``, atomically.

    Raises:
        UserError: another suffix.
    """
    path = check_path("rule file", path)
    if path.suffix not in RULE_FILES:
        raise UserError(f"rule file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    if path.suffix == ".json":
        write_text(path, json.dumps(rule.to_dict(), indent=2) + "\n")
        return
    import yaml

    write_text(path, yaml.safe_dump(rule.to_dict(), sort_keys=False, width=120))


def load_rule(path: str | os.PathLike[str]) -> ScalingRule:
    """Read a rule from a ``.json``, ``.yaml`` or ``.yml`` file.

    Raises:
        UserError: no such file, another suffix, or content that is no rule; the message names the file.
    """
    path = check_path("rule file", path)
    if path.suffix not in RULE_FILES:
        raise UserError(f"rule file {path} ends in {path.suffix!r}; it must end in .json, .yaml or .yml")
    text = read_text(path, "rule file")
    try:
        return ScalingRule.from_dict((json_of if path.suffix == ".json" else yaml_of)(text, "rule"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def as_rule(rule: object) -> str | ScalingRule:
    """A rule's name, or its coefficients: given, or read from a file.

    Raises:
        UserError: an unknown name (the nearest are given), or a file that holds no rule.
    """
    if isinstance(rule, ScalingRule) or (isinstance(rule, str) and rule in RULES):
        return rule
    if isinstance(rule, str | os.PathLike) and str(os.fspath(rule)).endswith(RULE_FILES):
        return load_rule(rule)
    if not isinstance(rule, str):
        raise UserError(f"scaling rule is {rule!r}; it must be one of {', '.join(RULES)}, a rule, or its file")
    raise UserError(f"scaling rule {rule!r} is unknown{nearest(rule, RULES)}")
