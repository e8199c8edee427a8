"""``python -m pytest --pyargs fastcss.selftest``: every op of this installation against float64, in under two minutes.

Needs pytest beside what the package itself needs; where PEFT is there, ``one_pass`` is compared with its loop, too.
"""
