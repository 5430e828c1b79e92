"""Own classes: labelled series → features → a calibrated head, scored by place → one ONNX graph."""
