"""Tests of hosts that cannot be installed beside what others require.

Each folder is one host: its ``requirements.txt``, and tests that run in an environment of its own::

    python -m tests.hosts [NAME ...]

An environment takes from the one that makes it whatever it need not replace, such as torch.
"""
