"""Classification of pixels: alignment with texts, cost volumes and what makes class maps of them."""
