"""Scenes with known truth: drawn or composed pictures, captions, region features and Winoground-like quadruples.

Order of reading: relations (what can be true), statements (what is said), layout and sampling (what is drawn), shapes
and sprites (of what), render (pixels and features), write (files).
"""
