"""Architecture search over one-shot supernets (DetNAS, arXiv 1903.10979)."""
