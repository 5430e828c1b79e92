"""Windows to predictions: ONNX sessions, batches, patches of imagery."""
