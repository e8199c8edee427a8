"""The commands of ``python -m fastcss``, a module each: ``HELP``, ``add_arguments(parser)``, ``run(options)``.

All of them are imported for any of them, so what is slow to import is imported where it is used.
"""
