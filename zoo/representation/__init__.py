"""Systems that learn, align and judge embeddings."""
