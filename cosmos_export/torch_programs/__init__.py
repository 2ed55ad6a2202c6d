"""Programs that PyTorch runs: TorchScript, and its successor, exported programs (pt2)."""
