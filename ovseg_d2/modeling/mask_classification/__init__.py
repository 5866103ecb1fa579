"""From masks to embeddings and from those to class scores."""
