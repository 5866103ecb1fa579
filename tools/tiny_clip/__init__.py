"""The parts of tools/pretrain_tiny_clip.py: the model, its optimizers, and what it sees."""
