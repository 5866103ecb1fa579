"""What models make on the way to their results, for figures: who names a mask how, maps of words, embeddings."""
