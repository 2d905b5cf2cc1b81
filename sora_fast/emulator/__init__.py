"""A PTX emulator: executes compiled kernels on CPU memory and reports errors, races and missing fences.

Section numbers refer to NVIDIA's PTX ISA. The entry point is ``sora_fast.testing.emulated_gpu``; nothing here depends on our
ops.

    triton_compile, triton_launch, csrc_launch, launches   from a launch to PTX and parameters; one run per schedule
    ptx, forms                                             PTX parser; the supported instructions
    blocks, codegen, codegen_arithmetic, codegen_memory    basic blocks to numpy source; arith has its helpers
    machine, scheduler, barriers                           CTAs and their warps, in any order
    loads_stores, async_copies, bulk_copies, tma           memory accesses and asynchronous copies
    tensor_cores, matrix, lanes                            mma and wgmma, their fragments, shuffles and votes
    memory, order, races, global_races                     bounds checks, happens-before, race detection
    counters                                               executed instructions, bytes, bank conflicts
"""
