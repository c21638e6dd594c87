"""Training runs that can be stopped or killed at any time, and go on as if they had not been."""
