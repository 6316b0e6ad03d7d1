"""How good compressed models are, and what each part of the method is worth."""
