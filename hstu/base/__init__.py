"""What belongs to no other room: errors, files, locks, hashes, figures, child processes. Imports nothing of ours."""
