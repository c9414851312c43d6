"""Where a ResNet helps a DQN: the suite behind ``benchmarks/atari.py``."""
