"""Pretrained networks around the generator: autoencoders and text encoders."""
