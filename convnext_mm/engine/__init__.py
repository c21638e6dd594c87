"""What training adds around mmengine's Runner: fallbacks, checks of the input, pictures."""
