"""What families share, under names from the field."""
