"""The forms in which a network can be shipped."""

from __future__ import annotations

from dataclasses import dataclass, replace

from convscale.ship.quantize import twin_of
from convscale.ship.request import ExportRequest

FLOAT = "onnx-fp32"
"""The form that every network must pass in; what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A way to write a network."""

    format: str
    """Of the file."""
    int8: str | None = None
    """In 8 bits, by this key of ``convscale.ship.quantize.ROUTES``; None: in float."""
    bf16: bool = False
    """Float operations are computed in bfloat16."""
    strided_stem: bool = False
    """A space-to-depth stem as one strided convolution."""

    def of(self, request: ExportRequest) -> ExportRequest:
        """A request, for this form."""
        return replace(
            request,
            format=self.format,
            int8=self.int8 is not None,
            int8_route=self.int8,
            bf16=self.bf16,
            strided_stem=self.strided_stem,
        )


FORMS = {
    FLOAT: Form(format="onnx"),
    "onnx-fp32-strided": Form(format="onnx", strided_stem=True),
    "openvino-fp32": Form(format="openvino"),
    "openvino-bf16": Form(format="openvino", bf16=True),
    "openvino-bf16-strided": Form(format="openvino", bf16=True, strided_stem=True),
    "torch-fp32": Form(format="torch"),
    "onnx-int8": Form(format="onnx", int8="nncf"),
    "onnx-int8-strided": Form(format="onnx", int8="nncf", strided_stem=True),
    "onnx-int8-ort": Form(format="onnx", int8="onnxruntime"),
    "onnx-int8-ort-strided": Form(format="onnx", int8="onnxruntime", strided_stem=True),
    "onnx-int8-signed": Form(format="onnx", int8="onnxruntime-signed"),
    "openvino-int8": Form(format="openvino", int8="nncf"),
    "openvino-int8-strided": Form(format="openvino", int8="nncf", strided_stem=True),
    "openvino-int8-bf16": Form(format="openvino", int8="nncf", bf16=True),
    "openvino-int8-bf16-strided": Form(format="openvino", int8="nncf", bf16=True, strided_stem=True),
}
FORMS |= {
    f"{name}-symmetric": replace(form, int8=twin)
    for name, form in tuple(FORMS.items())
    if form.int8 is not None and (twin := twin_of(form.int8)) is not None
}
"""The forms by name, in the order they are named in. ``ort``: by ONNX Runtime's own quantiser, else by NNCF.
``strided``: a space-to-depth stem as one strided convolution. ``symmetric``: with activations around zero.
``signed``: so, as TensorRT reads them; made where that is installed."""
