"""Tests every op of this installation against float64 in two minutes: ``python -m pytest --pyargs fastcss.selftest``.

The extra ``fastcss[selftest]`` brings pytest, which the package itself does not need. If PEFT is installed,
``one_pass`` is compared with its loop, too. ``python -m fastcss.selftest`` does the same, and takes pytest's options.
"""
