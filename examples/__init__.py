"""Small complete cogs to learn from; README.md describes them."""
