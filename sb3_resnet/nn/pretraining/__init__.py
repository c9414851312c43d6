"""Self-supervised pretraining of a trunk: frames, objectives, and the loop that trains and can be resumed."""
