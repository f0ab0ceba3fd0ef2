"""Models: a network with its flow map or denoiser, guidance, conditions, and the file that holds them."""
