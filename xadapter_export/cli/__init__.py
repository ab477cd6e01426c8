"""The command line: ``xad`` and its sub-commands, each also installed as ``xad-<name>``.

Heavy imports stand inside the commands, so that ``--help`` is instant.
"""
