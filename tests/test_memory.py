"""Memory that a training frees: kept for its next step, then returned."""

import subprocess
import sys

import pytest

from anomalib_cpr import memory

REUSE = """
import resource
from anomalib_cpr.memory import keep_freed_memory, return_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(100_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return 4096 * int(open("/proc/self/statm").read().split()[1])

new_pages()
usual = new_pages()
keep_freed_memory()
keep_freed_memory()
new_pages()
kept, held = new_pages(), resident()
return_freed_memory()
print(usual, kept, new_pages(), held - resident())
"""


@pytest.mark.skipif(memory._glibc() is None, reason="only glibc can be told to keep freed memory")
def test_freed_blocks_are_used_again_until_they_are_returned():
    usual, kept, returned, given_back = map(
        int, subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, check=True).stdout.split()
    )
    # A block of 100 MB has some 24,000 pages of 4 kB; with huge pages fewer.
    assert kept < usual / 10
    assert returned > usual / 2
    assert given_back > 90e6


def test_nothing_happens_with_another_c_library(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    memory.keep_freed_memory()
    assert not memory._kept
    memory.return_freed_memory()


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_what_the_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert memory._glibc.__wrapped__() is None
