"""Tests of Triton kernels on a CPU. They need Triton's interpreter from the start of the process: test_interpreted.py
beside this folder runs them in one of their own, and no other process collects them.
"""

from sora_fast import env

collect_ignore_glob = [] if env.interpreted() else ["test_*.py"]
