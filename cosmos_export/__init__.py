"""cosmos-export: Cosmos Advanced checkpoints become verified ONNX bundles. See `cosmos_export.pipeline` for the way."""
