"""Parameters of each GPU, with sources.

Rates are per SM unless stated otherwise; cycles are per warp instruction on one of its four sub-partitions.

Sources: CUDA C++ Programming Guide, "arithmetic instructions" (lanes a clock and SM: fp32 128 on sm_89 and 90, 64 on sm_80;
integer and logic 64; special functions 16; shuffles 32) and "technical specifications" (registers, warps, blocks, shared
memory); NVIDIA's data sheets and white papers (SMs, dense 16-bit Tensor Core rates, DRAM); Luo et al., arXiv 2402.13499 and
2501.12084 (latencies, wgmma's rate, mma.sync at 62 % of it on sm_90). Estimates are marked as such. A fitted constant
names the kernel of calibration.json that it was fitted to.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GPU:
    name: str
    cc: int
    sms: int
    ghz: float  # while the Tensor Cores are idle
    shared: int  # bytes that the blocks of an SM share
    dram: float  # achieved bytes per second of a copy, read plus written
    hmma: float  # cycles of mma.sync m16n8k16 with 16-bit operands and fp32 accumulators
    l2: float  # bytes a clock that one SM gets from L2 while all SMs stream
    l2_port: float = 64.0  # bytes a clock of a burst while others compute
    throttle: float = 0.0  # GHz by which the power limit lowers the clock while the Tensor Cores are fully busy
    wgmma_ports: float = 1.0  # cycles between instructions on registers while wgmma reads and writes its accumulators
    red: float = 1 / 3  # an atomic addition in L2 reads, adds and writes: a third of a load's rate
    warps: int = 64
    blocks: int = 32
    fma: int = 1
    half: int = 1
    alu: int = 2
    imad: int = 2
    xu: int = 8
    shfl: int = 4
    smem: int = 128  # bytes a clock of shared memory
    latency_l2: int = 300
    latency_dram: int = 1280  # 700 ns
    latency_tma: int = 520
    latency_smem: int = 30
    latency_shfl: int = 24
    latency_xu: int = 20
    latency_barrier: int = 24
    latency_wgmma: int = 24  # from the Tensor Core's last cycle to the end of the group (estimate)
    wgmma_queue: int = 2  # per warp, issued and not completed, before issue stalls (estimate)

    @property
    def bytes_per_clock(self) -> float:
        """DRAM's, for each SM."""
        return self.dram / self.sms / self.ghz / 1e9

    def clock(self, tensor: float) -> float:
        """GHz while ``tensor`` of the Tensor Cores' peak is reached."""
        return self.ghz - self.throttle * min(1.0, tensor)


# 1.83 GHz is the clock of the data sheet's 989 TFLOP/s, which no kernel holds: 1.38 at full rate, and wgmma_ports, are
# fitted to FlashAttention-3's forward (d256, d128) and Triton's tutorial 06 (d128); L2's 32 is what that d256 draws at the
# least, and "red" was chosen for FlashAttention-3's backward.
H200 = GPU("H200", 90, sms=132, ghz=1.83, throttle=0.45, wgmma_ports=2.0, shared=228 << 10, dram=4.3e12, hmma=6.5, l2=32.0)
H100 = replace(H200, name="H100", dram=3.0e12)
A100 = GPU("A100", 80, sms=108, ghz=1.41, shared=164 << 10, dram=1.6e12, hmma=8.0, l2=42.0, fma=2, latency_l2=270,
           latency_dram=650)
L40S = GPU("L40S", 89, sms=142, ghz=2.2, shared=100 << 10, dram=0.75e12, hmma=16.0, l2=28.0, warps=48, blocks=24, half=2,
           latency_dram=1200)
# GeForce's Tensor Cores take twice as long with fp32 accumulators (Ada white paper: 165 against 330 TFLOP/s).
RTX4090 = replace(L40S, name="4090", sms=128, ghz=2.5, dram=0.92e12, hmma=32.0)

GPUS = {"h200": H200, "h100": H100, "a100": A100, "l40s": L40S, "4090": RTX4090}


def blocks_per_sm(gpu: GPU, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """Resident blocks per SM, and what limits them: "registers", "shared memory", "warps" or "blocks".

    0: not even one fits. Registers are allocated in units of 8 per thread, shared memory with 1 KiB extra per block.
    """
    of_warp = max(1, -(-registers // 8) * 8 * 32)
    limits = {"registers": 65536 // of_warp // warps, "shared memory": gpu.shared // (shared + 1024),
              "warps": gpu.warps // warps, "blocks": gpu.blocks}
    limit = min(limits, key=limits.get)
    return limits[limit], limit
