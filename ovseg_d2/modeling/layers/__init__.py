"""Layers that know nothing of models: tensors in, tensors out."""
