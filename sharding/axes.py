"""Names of the logical axes that parameters declare; `rules.py` says where each one goes on a mesh."""

from __future__ import annotations

VOCAB = "vocab"
"""Rows of the embedding and of the output head, V."""
EMBED = "embed"
"""The model dimension, D."""
QKV_HEADS = "qkv_heads"
"""Output of the fused query, key and value projection, (N + 2K) H."""
HEADS = "heads"
"""All heads of one projection laid end to end, N H or K H."""
HEAD_DIM = "head_dim"
"""One head, H."""
MLP = "mlp"
"""The FFN dimension, F (2F in the fused gate and up projection)."""
POSITION = "position"
"""Learned absolute positions."""
EXPERT = "expert"
"""Experts of a mixture, E."""

LOGICAL_AXES = (VOCAB, EMBED, QKV_HEADS, HEADS, HEAD_DIM, MLP, POSITION, EXPERT)
