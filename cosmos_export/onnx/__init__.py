"""From the eager model to an ONNX graph: `signature` (every name), `trace`, `passes`, `weights`."""
