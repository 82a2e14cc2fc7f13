"""Parsers of files that strangers make, under random bytes."""
