"""One model on several GPUs."""
