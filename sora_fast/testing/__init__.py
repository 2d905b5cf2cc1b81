"""Is a function right? The error rule, the cases, and the report.

``assert_matches(op, got, inputs)`` for one call (used by every test), ``validate(op, fn)`` for all cases of an op,
``emulated_gpu("sm90")`` for kernels that run on CPU tensors as on a GPU; ``CudaKernel`` is a kernel of a .cu file.
"""

from ..other_names import missing
from .cases import cases
from .cuda_kernel import CudaKernel
from .emulated import emulated_gpu
from .rule import Comparison, Truth, assert_matches, compare, compare_with_reference, truth
from .validation import Report, validate

__all__ = ["Comparison", "CudaKernel", "Report", "Truth", "assert_matches", "cases", "compare", "compare_with_reference",
           "emulated_gpu", "truth", "validate"]


def __getattr__(name: str):
    raise missing(__name__, __all__, name)
