"""Stable Diffusion 3.5 Medium's PyTorch weights to a checkpoint of svdp_jax, the way back, and the proof that they agree."""
