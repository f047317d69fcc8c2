"""Checkpoints as folders that are whole or not there: written, checked, pruned, found again.

Nothing is imported here: `folder` and `plain` are for everybody, `find` needs Composer.
"""
