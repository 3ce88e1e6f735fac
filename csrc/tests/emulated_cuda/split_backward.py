"""Compares the emulated CUDA backward of split_conv2d with the CPU operator's.

Usage: python split_backward.py LIBDETKIT_OPS LIBDETKIT_EMULATED_CUDA
"""

import sys

import torch


def main() -> None:
    for library in sys.argv[1:]:
        torch.ops.load_library(library)
    torch.manual_seed(0)
    shapes = [(3, 8, 3, 3), (2, 8, 3, 3), (1, 8, 1, 3)]
    dilations, stride = [1, 1, 2, 3, 0, 2], [1, 2]
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.half, 0.05)):
        x, grad = torch.randn(2, 8, 9, 7, dtype=dtype), torch.randn(2, 6, 9, 4, dtype=dtype)
        weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
        arguments = (grad, x, weights, dilations, stride, 1, True, True)
        outputs = []
        for operators in (torch.ops.detkit, torch.ops.detkit_emulated):
            grad_input, grad_weights = operators._split_conv2d_backward(*arguments)
            outputs.append([grad_input, *grad_weights])
        for ours, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    main()
