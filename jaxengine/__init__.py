"""jaxengine: a JAX/XLA-first engine for running large language models."""
