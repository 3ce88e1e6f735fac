"""Every operator in plain PyTorch: the executable definition, and what runs where no kernel was built."""
