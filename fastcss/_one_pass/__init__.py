"""Every LoRA adapter of a model in one pass: ``runner`` is where to begin."""
