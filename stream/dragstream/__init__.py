"""DragStream: a training-free drag editor on the running stream (arXiv 2510.03550)."""
