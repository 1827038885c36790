"""Processes that do what strangers ask for, within bounds: they compile grammars and render templates of requests."""
