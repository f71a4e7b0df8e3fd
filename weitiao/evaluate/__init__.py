"""Measures: perplexity, dialogues with calls, the hotel task, comparisons."""
