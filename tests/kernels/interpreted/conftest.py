"""Tests that run the Triton kernels on a CPU.

Triton reads TRITON_INTERPRET when it decorates a kernel, once for a process, and the rest of the suite must
not run interpreted. So these modules are collected only where the variable is set; `../test_interpreted.py`
starts them in processes of their own; by hand it is `TRITON_INTERPRET=1 python -m pytest
tests/kernels/interpreted`.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
