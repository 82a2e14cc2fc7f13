"""What needs torch. Importing `cbir.features` does not import the modules of this package: the specs' `build` does."""
