"""CLIP's image and text towers."""
