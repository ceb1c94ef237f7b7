"""The Hub: its errors and pushing."""
