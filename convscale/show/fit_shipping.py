"""The section of a fit's report about what is shipped: the forms that were tried, what each came to, and the settings
of the one that won.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from convscale import words
from convscale.show.page import Column, Section, paragraph, table, tag

_BITS = {"fp32": "float32", "int8": "8 bits"}
_LIBRARIES = {"onnx": "ONNX file", "openvino": "OpenVINO file", "torch": "PyTorch program"}


def shipping(fit: Mapping[str, Any]) -> Section | None:
    """Forms and runtimes by speed, and by how much the winner is faster than the float network in its usual settings."""
    artifact = fit.get("artifact") or {}
    search = artifact.get("search") or {}
    forms = search.get("forms") or {}
    if not forms:
        return None
    columns = [
        Column(title="Form", kind="name"),
        Column(title="images/s", kind="n"),
        Column(title="ms a call", kind="n"),
        Column(title="Runs fastest in", kind="wide"),
        Column(title="Verdict", kind="wide"),
    ]
    winner = search.get("winner")
    order = sorted(forms, key=lambda name: -(forms[name].get("images_per_s") or 0))
    rows = [("winner" if name == winner else "", _cells(name, forms[name], name == winner)) for name in order]
    usual = search.get("usual") or {}
    if usual:
        rows.append(("dim", _cells("usual", usual, won=False)))
    body = paragraph(_sentence(search)) + table(columns, rows) + paragraph(_kept_in_float(artifact.get("int8")), "note")
    return Section(title="What is shipped", body=body, anchor="shipping")


def _sentence(search: Mapping[str, Any]) -> str:
    gain = search.get("gain")
    text = "Every form was tuned on this device: runtime, threads and streams, at the batch of the constraint. "
    if gain is not None:
        text += f"What is shipped runs {words.number(gain)} times as fast as the float network in its usual settings, both timed in the same turns."
    return text.strip()


def _cells(name: str, form: Mapping[str, Any], won: bool) -> list[str]:
    """One row, as HTML cells."""
    if "images_per_s" not in form:
        why = str(form.get("withheld") or form.get("failed") or "")
        verdict = tag("withheld" if form.get("withheld") else "does not run", "bad")
        return [_form(name), words.UNKNOWN, words.UNKNOWN, "", f"{verdict} {escape(why)}"]
    latency = form.get("latency_s")
    where = f"{form.get('runtime', '?')}, {words.plural(form.get('threads') or 1, 'thread')}, {words.plural(form.get('streams') or 1, 'stream')}"
    verdict = (
        tag("shipped", "good") if won else tag("usual settings, for comparison") if name == "usual" else tag("slower")
    )
    return [
        _form(name),
        words.rate(form["images_per_s"]),
        words.number(1000 * latency) if latency else words.UNKNOWN,
        escape(f"{where}, batch {form.get('batch_size', '?')}"),
        verdict,
    ]


def _form(name: str) -> str:
    """``onnx-int8-strided`` in words, as HTML."""
    if name == "usual":
        return "ONNX file, float32"
    library, _, rest = name.partition("-")
    bits, _, stem = rest.partition("-")
    text = f"{_LIBRARIES.get(library, library)}, {_BITS.get(bits, bits)}"
    return escape(text) + ('<span class="sub">stem as one strided convolution</span>' if stem == "strided" else "")


def _kept_in_float(int8: Mapping[str, Any] | None) -> str:
    """Which layers of an 8-bit artefact stayed in float, and what the rest cost on validation."""
    steps = (int8 or {}).get("steps") or []
    if not int8 or not steps:
        return ""
    last = steps[-1]
    kept = list(last.get("float_layers") or ())
    names = f": {', '.join(kept[:12])}{' ...' if len(kept) > 12 else ''}" if kept else ""
    return (
        f"8 bits cost {last.get('drop_points', 0):.2f} points on validation (allowed: {int8.get('max_drop', 0):g}) "
        f"with {words.plural(len(kept), 'layer')} of {int8.get('layers', '?')} left in float{names}."
    )
