"""The two ways a job ends badly. Each carries one line for the person: what, where, why, what to do."""

from __future__ import annotations


class LabelfreeError(Exception):
    """The work failed through no fault of the input (exit code 1)."""

    exit_code = 1


class InputError(LabelfreeError):
    """Wrong use or bad input (exit code 2)."""

    exit_code = 2
