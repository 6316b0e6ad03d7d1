"""What a conversion takes, and what a server has to hold."""
