"""The command line: ``sora-fast`` or ``python -m sora_fast.cli``.

argparse, because info, explain and validate must run where nothing but torch is installed.
"""
