"""A stream's peak memory, in processes of their own, does not grow with the clip."""

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.full, pytest.mark.ci]


PEAK = """
import resource, sys, torch
from sora_fast.models import VideoVAE
direction, frames, keep = sys.argv[1], int(sys.argv[2]), len(sys.argv) > 3
torch.manual_seed(0)
vae, held = VideoVAE.preset("tiny"), []
steps = 1 + (frames - 1) // 4
if direction == "decode":
    stream = vae.decode_stream(torch.randn(1, 16, 1, 8, 12) for _ in range(steps))
else:
    stream = vae.encode_stream(torch.randn(1, 3, 4 if i else 1, 64, 96) for i in range(steps))
for part in stream:
    if keep:
        held.append(part.repeat(1, 40, 1, 1, 1))
try:  # getrusage starts from the peak of the process that started this one
    with open("/proc/self/status") as status:
        print(next(line for line in status if line.startswith("VmHWM")).split()[1])
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(*arguments):
    done = subprocess.run([sys.executable, "-c", PEAK, *map(str, arguments)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not on Windows")
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_peak_memory_does_not_grow_with_the_length(direction):
    """257 frames streamed in a fresh process, dropped as they come, against 17: within 5 %."""
    short, long = peak(direction, 17), peak(direction, 257)
    assert long <= 1.05 * short, f"{direction}: {long / short - 1:.1%}"


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not on Windows")
def test_a_stream_that_keeps_frames_fails_the_memory_check():
    assert peak("decode", 65, "keep") > 1.05 * peak("decode", 17, "keep")
