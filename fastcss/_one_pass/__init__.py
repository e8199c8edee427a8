"""Runs every LoRA adapter of a model in one pass; begin reading at ``runner``."""
