"""What is saved and how it is committed."""
