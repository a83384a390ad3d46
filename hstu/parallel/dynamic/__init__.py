"""Dynamic embedding tables: any int64 id finds a row, and gives it up when the table is full."""
