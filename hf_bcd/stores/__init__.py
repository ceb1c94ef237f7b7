"""Stored teachers: outputs that were computed once, for the views that training will show."""

from .store import Store
from .teacher import StoredTeacher
from .views import StoredViews


__all__ = ["Store", "StoredTeacher", "StoredViews"]
