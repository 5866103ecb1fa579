"""Losses and the matching of predictions with ground truth."""
