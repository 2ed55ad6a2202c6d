"""This project's exported program (torch.export) in one of its bundles: opened and run as a TorchScript one is."""

from __future__ import annotations

from benchmarks.engines.torchscript import Engine

__all__ = ["Engine"]
