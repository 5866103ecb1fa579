"""From logits to results."""
