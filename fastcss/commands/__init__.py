"""Holds the commands of ``python -m fastcss``, a module each: ``HELP``, ``add_arguments(parser)``, ``run(options)``.

Every command imports all of these modules, so slow imports stand inside the functions that need them.
"""
