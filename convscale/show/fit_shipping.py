"""The section of a fit's report about what is shipped: the forms that were tried, what each came to, and the settings
of the one that won.
"""

from __future__ import annotations

from html import escape

from convscale import words
from convscale.show.fit_parts import Form, Int8, Search
from convscale.show.fit_record import FitRecord
from convscale.show.page import Column, Section, cell, paragraph, table, tag

_BITS = {"fp32": "float32", "bf16": "bfloat16", "int8": "8 bits"}
_MORE = {
    "ort": "by ONNX Runtime's quantiser",
    "bf16": "the rest in bfloat16",
    "strided": "stem as one strided convolution",
    "symmetric": "with activations around zero",
    "signed": "as TensorRT reads it",
}
_LIBRARIES = {"onnx": "ONNX file", "openvino": "OpenVINO file", "torch": "PyTorch program"}


def shipping(fit: FitRecord) -> Section | None:
    """Forms and runtimes by speed, and how many times faster the winner is than the usual float network."""
    search = fit.artifact.search
    if search is None or not search.forms:
        return None
    forms, winner = search.forms, search.winner
    columns = [
        Column(title="Form", kind="name"),
        Column(title="images/s", kind="n"),
        Column(title="ms a call", kind="n"),
        Column(title="Runs fastest in", kind="wide"),
        Column(title="Verdict", kind="wide"),
    ]
    order = sorted(forms, key=lambda name: -(forms[name].images_per_s or 0))
    rows = [("winner" if name == winner else "", _cells(name, forms[name], name == winner)) for name in order]
    if search.usual is not None:
        rows.append(("dim", _cells("usual", search.usual, won=False)))
    body = paragraph(_sentence(search)) + table(columns, rows) + paragraph(_kept_in_float(fit.artifact.int8), "note")
    return Section(title="What is shipped", body=body, anchor="shipping")


def _sentence(search: Search) -> str:
    text = "Every form was tuned on this device: runtime, threads and streams, at the batch of the constraint. "
    if search.gain is not None:
        ends = f" ({search.gain_interval[0]:.2f} to {search.gain_interval[1]:.2f})" if search.gain_interval else ""
        text += (
            f"What is shipped runs {words.number(search.gain)}{ends} times as fast as the float network in its usual "
            "settings, both timed in the same turns."
        )
    return text.strip()


def _cells(name: str, form: Form, won: bool) -> list[str]:
    """One row, as HTML cells."""
    if form.images_per_s is None:
        why = form.withheld or form.failed or form.skipped or ""
        verdict = tag("slower") if form.skipped else tag("withheld" if form.withheld else "does not run", "bad")
        return [_form(name), words.UNKNOWN, words.UNKNOWN, "", f"{verdict} {escape(why)}"]
    threads, streams = words.plural(form.threads or 1, "thread"), words.plural(form.streams or 1, "stream")
    where = f"{form.runtime or '?'}, {threads}, {streams}, batch {form.batch_size or '?'}"
    verdict = (
        tag("shipped", "good") if won else tag("usual settings, for comparison") if name == "usual" else tag("slower")
    )
    return [
        _form(name),
        words.rate(form.images_per_s),
        words.number(1000 * form.latency_s) if form.latency_s else words.UNKNOWN,
        escape(where),
        verdict,
    ]


def _form(name: str) -> str:
    """``onnx-int8-strided`` in words, as HTML."""
    if name == "usual":
        return "ONNX file, float32"
    library, _, rest = name.partition("-")
    bits, *more = rest.split("-")
    text = f"{_LIBRARIES.get(library, library)}, {_BITS.get(bits, bits)}"
    return cell(text, "; ".join(_MORE.get(word, word) for word in more))


def _kept_in_float(int8: Int8 | None) -> str:
    """Which layers of an 8-bit artefact stayed in float, and what the rest cost on validation."""
    if int8 is None or not int8.steps:
        return ""
    last = int8.steps[-1]
    kept = last.float_layers
    names = f": {', '.join(kept[:12])}{' ...' if len(kept) > 12 else ''}" if kept else ""
    return (
        f"8 bits cost {last.drop_points or 0:.2f} points on validation (allowed: {int8.max_drop or 0:g}) "
        f"with {words.plural(len(kept), 'layer')} of {int8.layers or '?'} left in float{names}."
    )
