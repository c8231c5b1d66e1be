"""Rows in E4M3, each with a float32 scale: what the operators share that hold or send numbers in this form."""
