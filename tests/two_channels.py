"""Channels in which every kind of file of a store occurs: vectors in coded lists, and words in an inverted file."""

CHANNELS = {
    "whole": {
        "extractor": {"name": "sift", "max_features": 60},
        "encoders": [{"name": "rootsift"}, {"name": "vlad", "words": 8}, {"name": "pca", "dim": 16}],
        "index": {"name": "ivfpq", "lists": 2, "bytes": 8, "bits": 4},
        "keep_features": True,
    },
    "words": {
        "extractor": {"name": "sift", "max_features": 60},
        "encoders": [{"name": "rootsift"}],
        "index": {"name": "asmk", "words": 16},
        "keep_signatures": True,
    },
}
