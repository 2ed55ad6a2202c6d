"""Parts of `examples/train_demo_heads.py`: what the heads learn from, how they learn it, and how they are measured."""
