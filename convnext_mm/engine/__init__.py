"""Training and evaluation around mmengine's Runner: checks, fallbacks, hooks, launching."""
