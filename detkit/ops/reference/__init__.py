"""Every operator in plain PyTorch: the executable definition.

This is also what runs where no native kernel was built. One module per family:
:mod:`~detkit.ops.reference.nms`, ``roi`` and ``conv``.
"""
