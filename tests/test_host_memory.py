import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from scalevit.cpu import keep_freed_memory

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    keep_freed_memory()
np.ones(2**24)
before = pages()
for _ in range(4):
    np.ones(2**24)
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_what_is_freed_is_used_again():
    """Four times 128 MiB: handed out anew that is at least 256 faults, even in huge pages."""
    faults = {}
    for how in ("default", "kept"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["kept"] < 64 < faults["default"]
