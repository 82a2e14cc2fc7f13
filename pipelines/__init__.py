"""The edge of cbir: Ray, the command line, the stages and the query pool."""
