"""Outputs that must match a grammar: JSON schemas, regular expressions, choices, Lark and GBNF grammars."""
