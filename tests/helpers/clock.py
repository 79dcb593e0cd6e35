"""The clock, moved to another day, or forward by hand."""

import datetime
import time


def set_today(monkeypatch, day: str) -> datetime.date:
    """Let `datetime.date.today()` be a day, 2026-11-26, wherever it is called; return the day."""
    today = datetime.date.fromisoformat(day)

    class Date(datetime.date):
        @classmethod
        def today(cls):
            return today

    monkeypatch.setattr(datetime, "date", Date)
    return today


class Seconds:
    """What `time.monotonic` returns, moved by hand."""

    def __init__(self, monkeypatch):
        self._now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self._now)

    def pass_by(self, seconds: float) -> None:
        """Move the clock forward."""
        self._now += seconds
