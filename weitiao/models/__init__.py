"""A folder becomes a model: its shape, its loading, its parts, and tiny random ones for tests."""
