"""Training the VAE and the DiT: one loop, two tasks, checkpoints that survive."""
