"""A GPU that is not here: executes the PTX of compiled kernels on CPU memory, and reports what a GPU would not forgive.

Section numbers are of NVIDIA's PTX ISA. The way in is ``sora_fast.testing.emulated_gpu``; nothing here knows of our ops.

    triton_compile, triton_launch, csrc_launch, launches   a launch, to PTX and its parameters; one run per schedule
    ptx, forms                                             PTX text to instructions; which are known
    blocks, codegen, codegen_arithmetic, codegen_memory    basic blocks to numpy source; arith has what the source calls
    machine, scheduler, barriers                           CTAs and their warps, in any order
    loads_stores, async_copies, bulk_copies, tma           memory, and copies that complete later
    tensor_cores, matrix, lanes                            mma and wgmma, their fragments, exchange between lanes
    memory, order, races, global_races                     bounds, happens-before, and who breaks it
    counters                                               what was executed and moved
"""
