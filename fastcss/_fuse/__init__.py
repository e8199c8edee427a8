"""Runs a model's own modules on the fused ops; begin reading at ``fusion``. Each family of modules has a file."""
