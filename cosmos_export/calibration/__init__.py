"""Quantised weights that know the model's text: rounding that corrects its own errors, then levels and scales that are
learned from the model itself. What a recipe's `[calibration]` asks for.

text ──► rounding, layer by layer ──► learning against the unrounded model ──► quantised matrices by tensor name
"""
