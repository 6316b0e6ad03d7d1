"""How fast compressed models are served, and how steadily."""
