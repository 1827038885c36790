"""Compiling an engine's steps for devices that are not there, and what follows for memory and time."""
