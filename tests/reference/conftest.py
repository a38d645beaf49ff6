"""If this fails, property tests draw other examples elsewhere: a red test cannot be repeated."""

from hypothesis import settings

settings.register_profile(
    "repeatable", max_examples=30, deadline=None, derandomize=True, database=None
)
settings.load_profile("repeatable")
