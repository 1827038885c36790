"""A completion's text as reasoning, content and calls of tools."""
