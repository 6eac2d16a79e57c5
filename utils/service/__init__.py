"""What the machine that runs the bot sees of it: health and metrics."""
