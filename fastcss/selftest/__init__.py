"""Tests every op of this installation against float64 in two minutes: ``python -m pytest --pyargs fastcss.selftest``.

It needs pytest beside what the package itself needs. If PEFT is installed, ``one_pass`` is compared with its loop, too.
"""
