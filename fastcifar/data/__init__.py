"""Data sets, augmentations and loaders: images in, augmented batches out."""
