"""Parameter groups with their own learning rates, and schedules."""
