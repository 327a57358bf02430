"""What a compressed checkpoint is: all that loading needs, and how it is saved."""
