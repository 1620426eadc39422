"""What finished runs say: tables, tests, figures and a page, from run folders only.

Knows the files of run folders. Must not know torch, or how a run is trained.
"""
