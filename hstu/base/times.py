"""Times as text."""

from datetime import UTC, datetime


def as_date(seconds: int) -> str:
    """Format seconds since 1970, such as "2026-01-31 18:00:00 UTC"; as a number where there is no such date."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return f"second {seconds}"
