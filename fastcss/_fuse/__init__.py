"""A model's own modules on the fused ops: ``fusion`` is where to begin, and a file is one family of modules."""
