"""cbir: a distributed batch indexing pipeline for instance-level image retrieval."""
