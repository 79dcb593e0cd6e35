"""The clock, moved to another day."""

import datetime


def set_today(monkeypatch, day: str) -> datetime.date:
    """Let `datetime.date.today()` be a day, 2026-11-26, wherever it is called; return the day."""
    today = datetime.date.fromisoformat(day)

    class Date(datetime.date):
        @classmethod
        def today(cls):
            return today

    monkeypatch.setattr(datetime, "date", Date)
    return today
