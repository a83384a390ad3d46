"""What a user edits: gin files become frozen dataclasses here, and gin stops here."""
