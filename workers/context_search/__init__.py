"""Optimizing a user's contexts in the background: which items, in which order, raise the likelihood of what the user wanted.

`run` does one user from lease to event; `search` reads as one page; `judge` scores, `mutations` edits, `adapter` ties both to gepa.
"""
