"""Answers: sampling, the decoding loop, conversations with tools."""
