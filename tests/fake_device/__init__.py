"""A fake CUDA device: tensors that say they are on cuda:0 and hold CPU memory, so that host code for CUDA runs without one.

Host code alone is looked at: which device a tensor is on, what waits for the GPU, what a stream capture permits. Kernels
that are asked for by name are executed by the emulator (kernels.py). What it does not see: order between streams, memory
that the allocator uses again, and time. ../test_fake_device.py runs the drive_*.py here in a process of
their own, with guard.cpp preloaded.

    waits.py    what waits for the device, with its source line; what a capture forbids
    tensors.py  CudaTensor, and how an operator runs on it
    graphs.py   a stream capture that records operators, and its replay
    cuda.py     torch.cuda in their terms
    kernels.py  kernels on such tensors
"""
