"""Freed memory stays with the process inside, and goes back to the system afterwards."""

import platform
import subprocess
import sys

import pytest

MEASURE = """
import psutil, torch
from mmssl.training.allocator import freed_memory_kept
def used():
    return psutil.Process().memory_info().rss / 2**20
def use():
    blocks = [torch.ones(2**18) for _ in range(300)]  # of a MiB each
before = used()
with freed_memory_kept(torch.device("cpu")):
    use()
    inside = used()
print(inside - before, used() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told what to keep")
def test_freed_memory_is_kept_inside_and_given_back_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    inside, after = map(float, done.stdout.split())
    assert inside > 250 and after < 100  # malloc keeps up to 64 MiB at the end of its memory
