"""Pure tensor functions: top-k SVD, matrix views. Knows no model."""
