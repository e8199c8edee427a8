"""``python -m fastcss.selftest``: the self-test by itself, which says what to install where pytest is missing."""

from __future__ import annotations

import sys

try:
    import pytest
except ModuleNotFoundError:
    sys.exit("fastcss.selftest runs in pytest, which is not installed: pip install 'fastcss[selftest]'")

if __name__ == "__main__":
    sys.exit(pytest.main(["--pyargs", "fastcss.selftest", *sys.argv[1:]]))
